"""Checks of the exercises: QAT of a language model."""

import torch
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


def _top(rest=True, swap=False, alone=False, reduce=torch.mean):
    """The solution of the exercise, or with one argument changed a mistake."""

    def kl_of_top(student, ids, p):
        q = student.gather(-1, ids).softmax(-1) if alone else student.softmax(-1).gather(-1, ids)
        p = p / p.sum(-1, keepdim=True) if alone else p
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q)) if rest else (p, q)
        p, q = (q, p) if swap else (p, q)
        return reduce((p * (p / q).log()).sum(-1))

    return kl_of_top


@exercise("qat.top_k", solution=_top(), wrong=[
    _top(rest=False), _top(rest=False, alone=True), _top(swap=True), _top(reduce=torch.sum),
    lambda student, ids, p: student.sum() * 0, lambda student, ids, p: None])  # fmt: skip
def _top_k(answer):
    answer, g = function(answer, "kl_of_top"), torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(15, 11, generator=g) for _ in range(2))
    p, ids = teacher.softmax(-1).topk(3)
    loss = tensor(answer(student.requires_grad_(), ids, p), ())
    right, none, alone, swapped, total = (make(student, ids, p).item() for make in (
        _top(), _top(rest=False), _top(rest=False, alone=True), _top(swap=True), _top(reduce=torch.sum)))  # fmt: skip
    number(loss.item(), right, f"For the test's tokens the loss is {loss.item():.4f}, and {right:.4f} is right.", {
        none: "The rest of the vocabulary is missing: it is one more outcome, with probability 1 - sum.",
        alone: "You divided by the sum over the k tokens. Then the student may give them any total: keep the rest.",
        swapped: "That is KL(student || teacher): the teacher's probabilities are the weights.",
        total: "That is the sum over the tokens; the mean is wanted."}, within=1e-4)
    same = answer(teacher, ids, p).item()
    expect(abs(same) < 1e-4, f"For a student equal to its teacher the loss is {same:.3f}: it should be 0.")
    loss.backward()
    expect(bool(student.grad.any()), "The student gets no gradient.")
    return "k probabilities and k ids a token can be stored in advance: no teacher is needed during the training."


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
