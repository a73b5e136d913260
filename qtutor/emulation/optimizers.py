"""AdamW whose moments have fewer bits: ``te.optimizers.FusedAdam``, the numbers without the memory that it saves."""

import torch
from torch.optim.adamw import adamw

from .quantizers import DType, Float8CurrentScalingQuantizer, Float8Tensor


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP32 values as ``dtype`` holds them: FP16 and uint8 (FP8, E4M3) with one scale for the tensor."""
    if dtype == torch.uint8:
        return Float8CurrentScalingQuantizer(DType.kFloat8E4M3)(x).dequantize()
    half = torch.finfo(torch.float16).max / 2  # where FP16 puts amax
    scale = (x.abs().amax() / half).clamp(min=1e-38) if dtype == torch.float16 else 1.0
    return (x / scale).to(dtype).float() * scale


def _local(x: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: of a DTensor, its shard."""
    return getattr(x, "_local_tensor", x)


class FusedAdam(torch.optim.Optimizer):
    """AdamW that keeps its moments as float32, bfloat16, float16 or uint8, which stands for FP8.

    ``master_weights``: BF16 and FP8 parameters are rounded from FP32 copies, ``state[p]["master_param"]``; without them
    all parameters must be FP32.  A sharded parameter (DTensor) has its states sharded alike.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, master_weights=False,
                 exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.dtypes, self.master_weights = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}, master_weights
        if not set(self.dtypes.values()) <= {torch.float32, torch.bfloat16, torch.float16, torch.uint8}:
            raise RuntimeError("FusedAdam only supports fp32/fp16/bf16/fp8 exp_avg and exp_avg_sq.")
        if not master_weights and any(p.dtype != torch.float32 for group in self.param_groups for p in group["params"]):
            raise NotImplementedError("FusedAdam of BF16 or FP8 parameters is emulated with master_weights=True only.")

    @torch.no_grad()
    def initialize_state(self, param, store_param_remainders=False) -> None:
        """Make the states of ``param``: moments of zeros, and the master weight, a copy of what ``param`` holds."""
        local = _local(param)
        values = (local.dequantize(dtype=torch.float32) if isinstance(local, Float8Tensor) else local).detach().float()
        made = {name: torch.zeros_like(values) for name in self.dtypes}
        if self.master_weights:
            made["master_param"] = values.clone()
        for name, state in made.items():
            if local is not param:  # sharded
                from torch.distributed.tensor import DTensor

                state = DTensor.from_local(state, param.device_mesh, param.placements, shape=param.size(),
                                           stride=param.stride())  # fmt: skip
            self.state[param][name] = state

    def load_state_dict(self, state_dict) -> None:
        """Load what state_dict() returned; torch alone would round the states to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[p].update({name: x.clone() for name, x in state_dict["state"].get(number, {}).items()})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, then round the moments."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # one count for all, as in the real one
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.initialize_state(p)
                state = {name: _local(value) for name, value in self.state[p].items()}
                weight, rate = state.get("master_param", _local(p)), group["lr"]
                adamw([weight], [_local(p.grad).float()], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                      [torch.tensor(group["step"] - 1.0)], amsgrad=False, beta1=group["betas"][0], foreach=False,
                      beta2=group["betas"][1], lr=rate, weight_decay=group["weight_decay"], eps=group["eps"],
                      maximize=False)  # fmt: skip
                if self.master_weights:
                    _local(p).copy_(weight)
                for name, dtype in self.dtypes.items():
                    state[name].copy_(_rounded(state[name], dtype))
        return loss
