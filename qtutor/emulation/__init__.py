"""Transformer Engine's FP8 training on any device: the same names, the same numbers, none of the speed.

FP8 training in one paragraph.  The weights that the optimizer updates stay in FP32 (or BF16).  For each matrix product,
and only for it, both operands are rounded to 8 bits: the forward pass multiplies an input and a weight in E4M3 (range
448, 3 bits of mantissa), the backward pass multiplies the incoming gradient in E5M2 (range 57344, 2 bits of mantissa:
gradients need range more than they need digits) with the weight and with the input again.  An 8-bit number reaches
neither far up nor far down, so each tensor is first multiplied by one FP32 number, its *scale*, which puts its largest
magnitude (*amax*) at the top of the format:

    scale = max_of_format / amax / 2**margin          scale_inv = 1 / scale
    codes = round_to_fp8(clamp(tensor * scale))       tensor is about codes * scale_inv

Products are summed in high precision and multiplied by both scale_invs.  What is left to choose is where amax comes
from and how many values share a scale, and that is the *recipe*:

- :class:`DelayedScaling`: one scale a tensor, from the last ``amax_history_len`` steps.  One pass over the tensor
  quantizes it and notes its amax for later; the price is a scale that is a step old.
- :class:`Float8CurrentScaling`: one scale a tensor, from the tensor itself.  Two passes, never out of date.
- :class:`Float8BlockScaling`: one for each 128 values, from themselves: an outlier spoils its block only.
- :class:`MXFP8BlockScaling`: one for each 32; :class:`NVFP4BlockScaling`: 4-bit values, one for each 16.  They need
  a Blackwell GPU; here everyone can study them.

The emulation repeats what NVIDIA Transformer Engine 2.20 computes on a Hopper GPU.  Bytes, scales and amax histories
are the same bit for bit where the numbers before quantization are; matrix products are summed in FP32, where the
hardware keeps fewer bits, so outputs and gradients agree within the rounding of BF16.

    recipes        how scales are chosen
    quantizers     the formats, the cast, FP8 tensors, one scale a tensor
    blocks         a scale for each few values: blocks of 128, MXFP8, NVFP4
    regions        autocast, the state of delayed scaling, FP8 parameters, activation checkpointing
    modules        the FP8 product with its gradients, Linear
    layers         norms, LayerNormLinear, LayerNormMLP, attention, TransformerLayer

    with autocast(enabled=True, recipe=DelayedScaling(amax_history_len=16)):
        y = Linear(256, 768)(x)                       # y keeps the dtype of x
    y.sum().backward()                                # outside the autocast

How it stays cheap: an FP8 number is exactly representable in FP32, so the products run on the FP32 matrix units with
the two scales folded into one factor of the result.  ``bench/bench_te.py`` says what is left of the cost.

Sources: Transformer Engine's documentation, "Using FP8 and FP4 with Transformer Engine"; Micikevicius et al., FP8
Formats for Deep Learning, arXiv:2209.05433.
"""

# ruff: noqa: F401, I001 - what is imported here is what `import transformer_engine.pytorch as te` finds
from .blocks import Float8BlockQuantizer, MXFP8Quantizer, NVFP4Quantizer
from .layers import (DotProductAttention, LayerNorm, LayerNormLinear, LayerNormMLP, RMSNorm, RotaryPositionEmbedding,
                     TransformerLayer)  # fmt: skip
from .modules import Linear
from .optimizers import FusedAdam
from .quantizers import DType, Float8CurrentScalingQuantizer, Float8Quantizer, Float8Tensor
from .recipes import (DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format, MXFP8BlockScaling,
                      NVFP4BlockScaling, QParams, Recipe, get_default_recipe, is_bf16_available, is_fp8_available,
                      is_fp8_block_scaling_available, is_mxfp8_available, is_nvfp4_available)  # fmt: skip
from .regions import autocast, checkpoint, fp8_autocast, fp8_model_init, quantized_model_init
