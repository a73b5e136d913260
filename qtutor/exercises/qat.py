"""Checks of the exercises: QAT of a language model."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import fake_quant, packed
from ..lesson import exercise, expect, quiet
from .answers import function, number, several, tensor


@exercise("qat.recovered", solution=[0.75, 2 / 3], wrong=[
    [0.25, 1 / 3], [2 / 3, 0.75], [75, 66.7], [0.75, 0.75], [0.75, 0.5], [1.0, 2 / 3], 0.75, "75 %"])  # fmt: skip
def _recovered(answer):
    ptq, control = several(answer, 2, "two shares")
    number(ptq, 0.75, "Against PTQ: 24 - 20 was lost and 24 - 21 came back; 1 is all of it.", {
        0.25: "That is what is still lost; the question is what came back."}, within=0.01)
    number(control, 2 / 3, "Against the control: 23 - 20 is still lost there, and QAT has 23 - 21 of it.", {
        0.75: "Of the control's loss, 23 - 20, not of PTQ's."}, within=0.01)
    return "A quarter of what PTQ lost came back by ordinary training alone: the control deserves the credit for it."


def _kl(flat=True, swap=False, reduction="batchmean", detach=True):
    """The solution of the exercise, or with one argument changed a mistake."""

    def distillation_loss(student, teacher):
        p, q = (teacher.detach() if detach else teacher).log_softmax(-1), student.log_softmax(-1)
        p, q = (p.flatten(0, 1), q.flatten(0, 1)) if flat else (p, q)
        return F.kl_div(*((p, q) if swap else (q, p)), log_target=True, reduction=reduction)

    return distillation_loss


@exercise("qat.distillation", solution=_kl(), wrong=[
    _kl(flat=False), _kl(swap=True), _kl(reduction="mean"), _kl(detach=False),
    lambda student, teacher: F.cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten()),       # hard labels
    lambda student, teacher: -(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean(),   # cross-entropy
    lambda student, teacher: (student - teacher.detach()).square().mean(), lambda student, teacher: None])  # fmt: skip
def _distillation(answer):
    answer, g = function(answer, "distillation_loss"), torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 5, 11, generator=g).requires_grad_() for _ in range(2))
    loss = tensor(answer(student, teacher), ())
    p, q = teacher.detach().log_softmax(-1), student.detach().log_softmax(-1)
    forward, backward = ((a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p)))
    same = answer(teacher.detach().clone(), teacher.detach()).item()
    expect(abs(same) < 1e-4, f"For a student equal to its teacher the loss is {same:.3f}: it should be 0.")
    number(loss.item(), forward, f"For the test's logits the loss is {loss.item():.4f}, and {forward:.4f} is right.", {
        5 * forward: "'batchmean' divides by the first dimension, here 3 sequences and not 15 tokens: flatten first.",
        backward: "That is KL(student || teacher): the teacher's probabilities are the weights.",
        forward / 11: "'mean' divides by the vocabulary, too: a nat per token is a sum over it."}, within=1e-4)
    loss.backward()
    expect(teacher.grad is None or not teacher.grad.any(), "The teacher gets a gradient: detach it (or no_grad).")
    return "A whole distribution for each token, where the next token alone is one number."


def _names(chosen):
    """A way to do the exercise: the names of the modules that ``chosen`` accepts."""
    return lambda model: [name for name, module in model.named_modules() if chosen(module)]


_still_float_solution = _names(lambda m: isinstance(m, nn.Linear) and not hasattr(m.weight, "qdata"))


@exercise("qat.still_float", solution=_still_float_solution, wrong=[
    _names(lambda m: type(m) is nn.Linear), _names(lambda m: isinstance(m, nn.Linear)),
    _names(lambda m: isinstance(getattr(m, "weight", None), torch.Tensor) and m.weight.dtype == torch.float32),
    lambda model: [], lambda model: len(_still_float_solution(model))])  # fmt: skip
def _still_float(answer):
    quiet()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    answer = function(answer, "still_float")

    def model():
        return nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    made = answer(model())
    expect(isinstance(made, (list, tuple)), "Return a list of names.")
    expect(list(made) == ["1", "3"], "In a plain model the two nn.Linear, '1' and '3', and nothing else, are listed.")
    prepared = fake_quant.prepare(model(), "int4", group_size=32)
    expect(list(answer(prepared)) == ["1", "3"],
           "A prepared layer is fake-quantized: its weight is float. It is a *subclass* of nn.Linear.")  # fmt: skip
    expect(list(answer(packed.convert(prepared))) == [], "After our convert no nn.Linear is left: nothing is float.")
    quantized = model()
    quantize_(quantized, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "3")
    torchao = "torchao keeps the nn.Linear and puts a tensor with .qdata into it, whose dtype *says* float32."
    expect(list(answer(quantized)) == ["1"], torchao)
    return "Put those lines behind every convert: a model that stayed float works perfectly, and that is the trouble."
