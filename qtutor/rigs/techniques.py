"""A model in each technique of the course: what :mod:`qtutor.decide.techniques` names, built.

PyTorch's techniques change a float LlamaForCausalLM in place; the head and the embedding stay as they are.

    model = techniques.build("torchao INT8 weight-only")                    # the course model, ready to run
    model = techniques.convert(my_bf16_llama, "torchao FP8 dynamic")        # any Llama
"""

from __future__ import annotations

import importlib

import torch
from torch import nn
from torch.nn import functional as F

from .. import course_model, te_switch
from ..decide import capacity
from ..decide.techniques import TECHNIQUES, Technique
from .fp8_layers import require_fp8


def device() -> str:
    """Where techniques run: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def float_model(shape: str = "course", where: str | None = None, dtype=None):
    """A LlamaForCausalLM to quantize: the course model, or one of capacity.MODELS's shapes with random weights."""
    where, dtype = where or device(), dtype or torch.bfloat16
    if shape == "course":
        return course_model.load(dtype=dtype, device=where)
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(where):
            return LlamaForCausalLM(LlamaConfig(**capacity.config_of(shape))).eval()
    finally:
        torch.set_default_dtype(before)


def convert(model, technique: str | Technique):
    """Quantize a BF16 LlamaForCausalLM in place, on its own device, and return it.  ``technique`` is one that PyTorch
    runs, or its name.  Raises QtutorError where this machine cannot run it."""
    technique = TECHNIQUES[technique] if isinstance(technique, str) else technique
    on_gpu = next(model.parameters()).is_cuda
    if technique.torchao:
        return _torchao(model, technique.torchao_gpu if on_gpu and technique.torchao_gpu else technique.torchao)
    if technique.family == "fp8":
        return _te_emulated(model) if technique.emulated else te_inference(model)
    return model


def build(technique: str | Technique, shape: str = "course", where: str | None = None):
    """The model of a technique that PyTorch runs, in eval mode; FP32 in float32, all others from bfloat16."""
    name = getattr(technique, "name", technique)
    with torch.no_grad():
        start = float_model(shape, where, torch.float32 if name == "FP32" else torch.bfloat16)
        return convert(start, technique).eval()


def _torchao(model, config: str):
    """Quantize the linear layers of the model's body with a configuration of torchao."""
    ao = importlib.import_module("torchao.quantization")
    options = {
        "IntxWeightOnlyConfig": lambda: dict(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "Int4WeightOnlyConfig": lambda: dict(group_size=32, int4_packing_format="tile_packed_to_4d"),
        "Float8DynamicActivationFloat8WeightConfig": lambda: dict(granularity=ao.PerRow()),
    }.get(config, dict)()
    if next(model.parameters()).is_cuda:
        # torchao 0.18 prints its operand in each eager call to see what it is, which a CUDA graph cannot hold, and
        # multiplies fewer than 17 rows in FP32.
        importlib.import_module("torchao.kernel.intmm").safe_int_mm = _int_mm
    ao.quantize_(model.model.layers, getattr(ao, config)(**options))
    return model


def _int_mm(a, b):
    """int8 (m, k) x (k, n) -> int32, padded to the 32 rows that cuBLAS wants at least."""
    return torch._int_mm(F.pad(a, (0, 0, 0, max(0, 32 - len(a)))), b)[: len(a)]


def te_inference(model):
    """te.Linear with FP8 weights and nothing else, in every layer; rows padded to 8, which FP8 products ask for."""
    te = require_fp8()
    from transformer_engine.common.recipe import Float8CurrentScaling

    recipe = Float8CurrentScaling()

    class Padded(nn.Module):
        def __init__(self, linear):
            super().__init__()
            sizes, weight = (linear.in_features, linear.out_features), linear.weight
            with te.quantized_model_init(enabled=True, recipe=recipe):
                biased = linear.bias is not None
                self.inner = te.Linear(*sizes, bias=biased, device="cuda", params_dtype=weight.dtype)
            self.inner.weight.copy_(weight)  # quantizes; an init_method would keep the BF16 weight alive
            if biased:
                self.inner.bias.copy_(linear.bias)

        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            padded = F.pad(rows, (0, 0, 0, -len(rows) % 8)) if len(rows) % 8 else rows
            with te.autocast(enabled=True, recipe=recipe):
                return self.inner(padded)[: len(rows)].view(*x.shape[:-1], -1)

    for parent, name, child in list(body_linears(model)):
        setattr(parent, name, Padded(child))
        child.weight = None
    return model


def body_linears(model):
    """(parent, name, layer) of each linear layer of a Llama's body."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


def _te_emulated(model):
    """FP8 products in every layer (current scaling), computed by the emulation: the numbers, not the speed."""
    te_switch.activate()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    te_switch.swap_linears(model)
    forward = model.forward

    def in_fp8(*args, **kwargs):
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            return forward(*args, **kwargs)

    model.forward = in_fp8
    return model
