"""Checks of the exercises: QAT of a language model."""

from __future__ import annotations

from ..lesson import exercise


@exercise("qat.recovered", solution=[0.75, 2 / 3], wrong=[
    [0.25, 1 / 3], [2 / 3, 0.75], [75, 66.7], [0.75, 0.75], [0.75, 0.5], [1.0, 2 / 3], 0.75, "75 %"])  # fmt: skip
def _recovered(answer):
    assert isinstance(answer, (list, tuple)) and len(answer) == 2, "Give a list of two shares."
    assert all(isinstance(share, (int, float)) for share in answer), "Give numbers."
    assert all(share <= 1 for share in answer), "Give shares, 1 being all, and not percent."
    ptq, control = answer
    assert abs(ptq - 0.25) > 1e-3, "That is what is still lost; the question is what came back."
    assert abs(ptq - 0.75) < 0.01, "Against PTQ: 24 - 20 was lost and 24 - 21 came back."
    assert abs(control - 0.75) > 1e-3, "Of the control's loss, 23 - 20, not of PTQ's."
    assert abs(control - 2 / 3) < 0.01, "Against the control: 23 - 20 is still lost there, and QAT has 23 - 21 of it."
    return "A quarter of what PTQ lost came back by ordinary training alone: the control deserves the credit for it."


def _distillation_solution(student, teacher):
    import torch.nn.functional as F

    wanted = teacher.detach().log_softmax(-1).flatten(0, 1)
    return F.kl_div(student.log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean")


def _kl_wrong(flat=True, swap=False, reduction="batchmean", detach=True):
    def distillation_loss(student, teacher):
        import torch.nn.functional as F

        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        if detach:
            p = p.detach()
        if flat:
            p, q = p.flatten(0, 1), q.flatten(0, 1)
        return F.kl_div(p, q, log_target=True, reduction=reduction) if swap else F.kl_div(
            q, p, log_target=True, reduction=reduction)  # fmt: skip

    return distillation_loss


def _hard_labels(student, teacher):
    import torch.nn.functional as F

    return F.cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten())


def _soft_cross_entropy(student, teacher):
    return -(teacher.detach().softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


@exercise("qat.distillation", solution=_distillation_solution, wrong=[
    _kl_wrong(flat=False), _kl_wrong(swap=True), _kl_wrong(reduction="mean"), _kl_wrong(detach=False), _hard_labels,
    _soft_cross_entropy, lambda student, teacher: (student - teacher.detach()).square().mean(),
    lambda student, teacher: None])  # fmt: skip
def _distillation(answer):
    import torch

    assert callable(answer), "Give the function itself: distillation_loss, without brackets."
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, 11, generator=g).requires_grad_()
    student = torch.randn(3, 5, 11, generator=g).requires_grad_()
    loss = answer(student, teacher)
    assert loss is not None, "The function returns nothing: is there a return?"
    assert isinstance(loss, torch.Tensor) and loss.ndim == 0, "Return one number, as a tensor."
    p, q = teacher.detach().log_softmax(-1), student.detach().log_softmax(-1)
    forward, backward = ((a.exp() * (a - b)).sum(-1).mean().item() for a, b in ((p, q), (q, p)))
    got = loss.item()
    assert abs(got - 5 * forward) > 1e-4, (
        "'batchmean' divides by the first dimension alone, here 3 sequences and not 15 tokens: flatten first.")
    assert abs(got - backward) > 1e-4, "That is KL(student || teacher): the teacher's probabilities are the weights."
    assert abs(got - forward / 11) > 1e-4, "'mean' divides by the vocabulary, too: a nat per token is a sum over it."
    same = answer(teacher.detach().clone(), teacher.detach()).item()
    assert abs(same) < 1e-4, f"For a student equal to its teacher the loss is {same:.3f}: it should be 0."
    assert abs(got - forward) < 1e-4, f"For the test's logits the loss is {got:.4f}, and {forward:.4f} is right."
    loss.backward()
    assert teacher.grad is None or not teacher.grad.any(), "The teacher gets a gradient: detach it (or no_grad)."
    return "A whole distribution a token, where the next token alone is one number."


def _still_float_solution(model):
    from torch import nn

    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not hasattr(module.weight, "qdata")]  # fmt: skip


def _plain_linears(model):
    from torch import nn

    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _any_linear(model):
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _by_dtype(model):
    import torch

    return [name for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dtype == torch.float32]


@exercise("qat.still_float", solution=_still_float_solution, wrong=[
    _plain_linears, _any_linear, _by_dtype, lambda model: [],
    lambda model: len(_still_float_solution(model))])  # fmt: skip
def _still_float(answer):
    import logging

    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from .. import fake_quant, packed

    assert callable(answer), "Give the function itself: still_float, without brackets."

    def model():
        return nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    made = answer(model())
    assert made is not None, "The function returns nothing: is there a return?"
    assert isinstance(made, (list, tuple)), "Return a list of names."
    assert list(made) == ["1", "3"], "In a plain model the two nn.Linear, '1' and '3', and nothing else, are listed."
    prepared = fake_quant.prepare(model(), "int4", group_size=32)
    assert list(answer(prepared)) == ["1", "3"], (
        "A prepared layer is fake-quantized: its weight is float. It is a *subclass* of nn.Linear.")
    stored = packed.convert(prepared)
    assert list(answer(stored)) == [], "After our convert no nn.Linear is left, and so nothing is float."
    quantized = model()
    quantize_(quantized, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "3")
    assert list(answer(quantized)) == ["1"], (
        "torchao keeps the nn.Linear and puts a tensor with .qdata into it, whose dtype *says* float32.")
    return "Put those lines behind every convert: a model that stayed float works perfectly, and that is the trouble."
