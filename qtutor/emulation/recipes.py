"""Recipes: how scales are chosen, with the defaults and refusals of Transformer Engine 2.20.

A recipe is a description.  :mod:`qtutor.emulation.regions` reads it and makes the quantizers of a module.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class _Maxima(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """Which format holds what: ``value.max_fwd`` and ``value.max_bwd`` are the largest magnitudes."""

    E2M1 = _Maxima(6, 6)
    E4M3 = _Maxima(448, 448)
    E5M2 = _Maxima(57344, 57344)
    HYBRID = _Maxima(448, 57344)  # E4M3 forward, E5M2 backward


@dataclass(frozen=True)
class QParams:
    """How a recipe quantizes one kind of tensor: scales rounded to powers of two and the least amax (current and block
    scaling); Hadamard transform, stochastic rounding and squares (NVFP4)."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


def _is(*names: str):
    return classmethod(lambda cls: any(issubclass(cls, globals()[name]) for name in names))


@dataclass(kw_only=True)
class Recipe:
    """Base class of the recipes; the class methods say which one a recipe is.  ``fp8_dpa`` and ``fp8_mha``, attention
    in FP8, are not emulated: NotImplementedError."""

    fp8_dpa: bool = False
    fp8_mha: bool = False
    delayed = _is("DelayedScaling")
    float8_current_scaling = _is("Float8CurrentScaling")
    float8_per_tensor_scaling = _is("DelayedScaling", "Float8CurrentScaling")
    float8_block_scaling = _is("Float8BlockScaling")
    mxfp8 = _is("MXFP8BlockScaling")
    nvfp4 = _is("NVFP4BlockScaling")

    def __post_init__(self):
        assert self.fp8_format != Format.E5M2, "Pure E5M2 training is not supported."
        for name in "fp8_dpa", "fp8_mha":
            if getattr(self, name):
                raise NotImplementedError(f"{type(self).__name__}({name}=True) is not emulated: leave it False.")


@dataclass
class DelayedScaling(Recipe):
    """One scale a tensor, from the amax of earlier steps.

    The scale is divided by ``2**margin``, room for an amax that grows.  ``fp8_format``: ``Format.HYBRID`` (E4M3 forward
    and E5M2 backward) or ``Format.E4M3``.  ``amax_compute_algo``: ``"max"`` of the history or ``"most_recent"``.
    ``reduce_amax``: over several GPUs.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}: use 'max' or 'most_recent'")


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own amax.  Nothing is remembered."""

    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams()  # set on an instance; class attributes, as in the real library
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()


@dataclass
class Float8BlockScaling(Recipe):
    """One FP32 scale for each 128 values (128 x 128 for weights), a power of two by default."""

    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)


@dataclass
class MXFP8BlockScaling(Recipe):
    """One power-of-two scale for each 32 values.  The hardware for it is Blackwell; the emulation runs anywhere.
    ``fp8_format``: ``Format.E4M3`` in both directions, or ``Format.HYBRID``."""

    margin: int = 0  # no effect in the real library either
    fp8_format: Format = Format.E4M3


@dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 values, one E4M3 scale for each 16.  The hardware for it is Blackwell; the emulation runs anywhere.  What
    can be left out: the random Hadamard transform, stochastic rounding of gradients, squares for weights."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3  # of the scales

    def __post_init__(self):
        assert self.fp4_format is Format.E2M1, "Only E2M1 is supported for NVFP4 scaling"
        assert self.fp8_format is Format.E4M3, "Only E4M3 is supported for NVFP4 scaling"
        super().__post_init__()
        rotate = not self.disable_rht
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=rotate)
        self.fp4_quant_fwd_weight = QParams(fp4_2d_quantization=not self.disable_2d_quantization)
        self.fp4_quant_bwd_grad = QParams(random_hadamard_transform=rotate,
                                          stochastic_rounding=not self.disable_stochastic_rounding)  # fmt: skip


def get_default_recipe() -> Recipe:
    """The recipe of ``autocast()`` without one: delayed scaling, as on Hopper."""
    return DelayedScaling()


def _available(capability: str):
    def check(return_reason: bool = False):
        return (True, "") if return_reason else True

    check.__doc__ = f"True here, (True, '') with ``return_reason``; a GPU needs compute capability {capability}."
    return check


is_fp8_available = _available("8.9 or more")
is_fp8_block_scaling_available = _available("9.0 or more")
is_mxfp8_available = is_nvfp4_available = _available("10.0 or more")
is_bf16_available = _available("8.0 or more")
