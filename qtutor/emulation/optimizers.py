"""AdamW whose moments have fewer bits: ``te.optimizers.FusedAdam``, the numbers without the memory that it saves."""

import torch

from .quantizers import DType, Float8CurrentScalingQuantizer


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP32 values as ``dtype`` holds them: FP16 and uint8 (FP8, E4M3) with one scale for the tensor."""
    if dtype == torch.uint8:
        return Float8CurrentScalingQuantizer(DType.kFloat8E4M3)(x).dequantize()
    half = torch.finfo(torch.float16).max / 2  # where FP16 puts amax
    scale = (x.abs().amax() / half).clamp(min=1e-38) if dtype == torch.float16 else 1.0
    return (x / scale).to(dtype).float() * scale


class FusedAdam(torch.optim.AdamW):
    """AdamW of FP32 parameters that keeps its moments as float32, bfloat16, float16 or uint8, which stands for FP8."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, master_weights=False,
                 exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if not set(self.dtypes.values()) <= {torch.float32, torch.bfloat16, torch.float16, torch.uint8}:
            raise RuntimeError("FusedAdam only supports fp32/fp16/bf16/fp8 exp_avg and exp_avg_sq.")
        if master_weights or any(p.dtype != torch.float32 for group in self.param_groups for p in group["params"]):
            raise NotImplementedError("FusedAdam with master_weights is not emulated: keep the parameters in FP32.")

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, then round the moments."""
        loss = super().step(closure)
        for state in self.state.values():
            for name, dtype in self.dtypes.items():
                state[name].copy_(_rounded(state[name], dtype))
        return loss
