"""Recipes: how scales are chosen, with the arguments, defaults and refusals of Transformer Engine 2.20.

A recipe is a description.  :mod:`qtutor.emulation.regions` reads it and makes the quantizers of a module.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
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
class MMParams:
    """How the hardware sums a product.  Accepted and without effect: the emulation always sums in FP32."""

    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    """How a recipe quantizes one kind of tensor: scales rounded to powers of two and the least amax (current and block
    scaling); Hadamard transform, stochastic rounding and squares (NVFP4)."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


def _switch(name: str) -> bool:
    """An environment variable that the real library reads when it is imported."""
    return os.environ.get(name) == "1"


def _is(*names: str):
    return classmethod(lambda cls: any(issubclass(cls, globals()[name]) for name in names))


# Arguments that would switch on what is not emulated, and their values when off.
_OFF = dict(fp8_dpa=False, fp8_mha=False, backward_override=None, enable_2d_quantization=False,
            row_scaled_activation=False, nvfp4_4over6="none", nvfp4_4over6_e4m3_use_256="all",
            nvfp4_4over6_err_mode="MAE")  # fmt: skip


class Recipe:
    """Base class of the recipes; the class methods say which one a recipe is.

    Raises:
        AssertionError: what no recipe can do, with the real library's words.
        NotImplementedError: what is not emulated.
    """

    delayed = _is("DelayedScaling")
    float8_current_scaling = _is("Float8CurrentScaling")
    float8_per_tensor_scaling = _is("DelayedScaling", "Float8CurrentScaling")
    float8_block_scaling = _is("Float8BlockScaling")
    mxfp8 = _is("MXFP8BlockScaling")
    nvfp4 = _is("NVFP4BlockScaling")
    custom = _is()  # quantizers of the user's own are not emulated

    def __post_init__(self):
        assert self.fp8_format != Format.E5M2, "Pure E5M2 training is not supported."
        for name, off in _OFF.items():
            if (value := getattr(self, name, off)) != off:
                raise NotImplementedError(f"{type(self).__name__}({name}={value!r}) is not emulated: leave it {off!r}.")

    def __repr__(self) -> str:
        # Modules of one repr share their update of delayed scaling.
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: v.name if isinstance(v, Format) else v for k, v in shown.items()}
        return f"recipe_type={type(self).__name__}, " + ", ".join(f"{k}={v}" for k, v in shown.items())


@dataclass(repr=False)
class DelayedScaling(Recipe):
    """One scale a tensor, from the amax of earlier steps.

    The scale is divided by ``2**margin``, room for an amax that grows.  ``fp8_format``: ``Format.HYBRID`` (E4M3 forward
    and E5M2 backward) or ``Format.E4M3``.  ``amax_compute_algo``: ``"max"`` of the history, ``"most_recent"``, or a
    function of the history (amax_history_len, tensors) that returns one amax for each tensor.
    ``scaling_factor_compute_algo``: a function ``(amax, old_scale, fp8_max, recipe) -> scale`` for the formula.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.amax_compute_algo) and self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}: use 'max', 'most_recent' or a function")

    def __repr__(self) -> str:
        # The algorithms are not part of it in the real library either.
        return (f"recipe_type={type(self).__name__}, margin={self.margin}, format={self.fp8_format.name}, "
                f"amax_history_len={self.amax_history_len}, reduce_amax={self.reduce_amax}")  # fmt: skip


@dataclass(repr=False)
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from the tensor's own amax.  Nothing is remembered.

    ``use_power_2_scales`` shows what NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1 set; given here it changes nothing, in
    the real library too: set ``recipe.fp8_quant_fwd_inp`` and its siblings.
    """

    use_power_2_scales: bool = _switch("NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES")
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams(power_2_scale=use_power_2_scales)  # class attributes, as in the real library
    fp8_quant_fwd_weight = QParams(power_2_scale=use_power_2_scales)
    fp8_quant_bwd_grad = QParams(power_2_scale=use_power_2_scales)
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass(repr=False)
class Float8BlockScaling(Recipe):
    """One FP32 scale for each 128 values (128 x 128 for weights), a power of two by default.

    ``use_f32_scales`` shows what NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 set, as above.  ``x_block_scaling_dim`` and its
    siblings: 1 or 2, rows of 128 or squares, for inputs, weights and gradients; no two of them squares.
    """

    use_f32_scales: bool = _switch("NVTE_FP8_BLOCK_SCALING_FP32_SCALES")
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=not use_f32_scales)
    fp8_quant_fwd_weight = QParams(power_2_scale=not use_f32_scales)
    fp8_quant_bwd_grad = QParams(power_2_scale=not use_f32_scales)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self):
        dims = {name: getattr(self, f"{name}_block_scaling_dim") for name in ("x", "w", "grad")}
        for name, dim in dims.items():
            assert dim in (1, 2), f"Only 1D or 2D blocks supported for {name}"
        assert list(dims.values()).count(2) < 2, "2D by 2D block gemm not supported."
        for name in "fprop", "dgrad", "wgrad":
            split = getattr(self, f"fp8_gemm_{name}").use_split_accumulator
            assert split, f"Split accumulator required for {name}."
        super().__post_init__()


@dataclass(repr=False)
class MXFP8BlockScaling(Recipe):
    """One power-of-two scale for each 32 values.  The hardware for it is Blackwell; the emulation runs anywhere.

    ``fp8_format``: ``Format.E4M3`` in both directions, or ``Format.HYBRID``.  ``margin`` has no effect in the real
    library either.
    """

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False


@dataclass(repr=False)
class NVFP4BlockScaling(Recipe):
    """E2M1 values, one E4M3 scale for each 16.  The hardware for it is Blackwell; the emulation runs anywhere.

    What can be left out: the random Hadamard transform, stochastic rounding of gradients, squares for weights.
    """

    disable_rht: bool = _switch("NVTE_NVFP4_DISABLE_RHT")
    disable_stochastic_rounding: bool = _switch("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING")
    disable_2d_quantization: bool = _switch("NVTE_NVFP4_DISABLE_2D_QUANTIZATION")
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3  # of the scales
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

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


# ------------------------------------------------------------------------------------------------ what runs here
def _available(capability: str):
    def check(return_reason: bool = False):
        return (True, "") if return_reason else True

    check.__doc__ = f"True here, (True, '') with ``return_reason``; a GPU needs compute capability {capability}."
    return check


is_fp8_available = _available("8.9 or more")
is_fp8_block_scaling_available = _available("9.0 or more")
is_mxfp8_available = is_nvfp4_available = _available("10.0 or more")
is_bf16_available = _available("8.0 or more")
