"""Record golden vectors from the real Transformer Engine, for tests that hold the emulation against them.

    python data/reference/record_te.py OUT_DIR

needs a GPU on which FP8 runs (Hopper was used) and imports nothing of this project.  It writes

- ``te_linear.safetensors``: one te.Linear over 24 steps, by recipe and dtype.  ``inputs.*`` are common to all
  (float32; cast them): input, output gradient, first weight, bias and the factor that moves the weight after each
  step.  ``<recipe>_<dtype>.*`` are quantized bytes, scales and amax histories of every step, outputs and gradients
  of the steps in the metadata.  On the way: an outlier, a zero tensor, an evaluation without gradients, tiny
  numbers, and (late, because it spoils a history) an infinity;
- ``te_autocast.safetensors``: two layers with FP32 weights under torch.autocast(bfloat16);
- ``te_cast.safetensors``: every BF16 number through both formats;
- ``te_block.safetensors``: te.Linear under Float8BlockScaling, by sizes: bytes and scales of both directions;
- ``te_mlp.safetensors``: te.LayerNormMLP (RMSNorm, SwiGLU) over the same 24 steps, by recipe: scales and histories
  of both products, the bytes that it keeps for the backward pass, outputs and gradients of the steps in the metadata;
- ``te_layer.safetensors``: te.TransformerLayer (RMSNorm, SwiGLU, two query heads on one key head, causal, rotary
  embedding), in BF16 and under each recipe: outputs and gradients;
- ``te_parameters.safetensors``: weights made under quantized_model_init and moved by an optimizer;
- ``te_errors.json``: what the library says to shapes and recipes that it cannot run.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformer_engine
import transformer_engine.pytorch as te
from safetensors.torch import save_file
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

TOKENS, IN, OUT, STEPS, HISTORY = 32, 64, 48, 24, 8
OUTLIER, ZERO, EVALUATION, TINY, INFINITE = 6, 10, 13, 17, 22
KEPT = (0, 1, OUTLIER, ZERO, EVALUATION, INFINITE)  # steps of which outputs and gradients are kept: files stay small
RECIPES = {
    "delayed": lambda: DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="max"),
    "delayed_recent": lambda: DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="most_recent", margin=1),
    "delayed_e4m3": lambda: DelayedScaling(amax_history_len=1, fp8_format=Format.E4M3),
    "current": lambda: Float8CurrentScaling(),
}


def quantize(quantizer, tensor):
    """Bytes and scale_inv that ``quantizer`` gives, leaving its own amax as it was."""
    quantizer = quantizer.copy()
    if hasattr(quantizer, "scale"):
        quantizer.scale, quantizer.amax = quantizer.scale.clone(), quantizer.amax.clone()
    quantizer.internal = False
    quantizer.set_usage(rowwise=True, columnwise=False)
    result = quantizer(tensor.detach().contiguous())
    return result._data.view(torch.uint8).clone(), result._scale_inv.clone()


def batch(step, dtype, generator):
    """Input and output gradient of one step: magnitudes that grow and shrink, and the special steps."""
    x = torch.randn(TOKENS, IN, generator=generator) * 2.0 ** ((step * 5) % 7 - 3)
    dy = torch.randn(TOKENS, OUT, generator=generator) * 2.0 ** (-((step * 3) % 11))
    if step == OUTLIER:
        x[3, 5], dy[7, 2] = 3000.0, -500.0
    if step == ZERO:
        x.zero_(), dy.zero_()
    if step == TINY:
        x.mul_(1e-30), dy.mul_(1e-36)
    if step == INFINITE:
        x[0, 0], dy[1, 1] = float("inf"), float("-inf")
    return x.to("cuda", dtype), dy.to("cuda", dtype)


def factor(step):
    return 1.0 + 0.25 * ((step % 3) - 1)


def record(make_recipe, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = te.Linear(IN, OUT, bias=True, params_dtype=dtype, device="cuda")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, IN, generator=generator) * 0.1)
        layer.bias.copy_(torch.randn(OUT, generator=generator) * 0.1)
    recipe, rows = make_recipe(), {}

    def keep(name, tensor):
        rows.setdefault(name, []).append(tensor.detach().cpu().clone())

    for step in range(STEPS):
        x, dy = batch(step, dtype, generator)
        x.requires_grad_()
        keep("x", x), keep("dy", dy), keep("weight", layer.weight), keep("bias", layer.bias)
        if step == 0:  # a layer has no quantizers before its first forward pass
            probe = te.Linear(IN, OUT, bias=True, params_dtype=dtype, device="cuda")
            with torch.no_grad(), te.autocast(enabled=True, recipe=make_recipe()):
                probe(torch.zeros_like(x))
            quantizers = probe.quantizers
        else:
            quantizers = layer.quantizers
        for name, tensor, quantizer in (("x", x, quantizers["scaling_fwd"][0]),
                                        ("w", layer.weight, quantizers["scaling_fwd"][1]),
                                        ("dy", dy, quantizers["scaling_bwd"][0])):  # fmt: skip
            codes, scale_inv = quantize(quantizer, tensor)
            keep(f"{name}_codes", codes), keep(f"{name}_scale_inv", scale_inv)
        if step == EVALUATION:
            with torch.no_grad(), te.autocast(enabled=True, recipe=recipe):
                keep("y", layer(x))
            keep("dx", torch.zeros_like(x)), keep("dw", torch.zeros_like(layer.weight))
            keep("db", torch.zeros_like(layer.bias))
        else:
            with te.autocast(enabled=True, recipe=recipe):
                y = layer(x)
            y.backward(dy)
            keep("y", y), keep("dx", x.grad), keep("dw", layer.weight.grad), keep("db", layer.bias.grad)
        for direction in ("fwd", "bwd"):
            state = layer.fp8_meta[f"scaling_{direction}"]
            if hasattr(state, "scale"):
                keep(f"scale_{direction}", state.scale), keep(f"amax_history_{direction}", state.amax_history)
        with torch.no_grad():  # move the weights, so that their scales move too
            layer.weight.mul_(factor(step))
            layer.weight.grad = layer.bias.grad = None
    return {name: torch.stack(tensors).contiguous() for name, tensors in rows.items()}


def thin(recorded):
    """Join the recordings ("delayed_bf16": rows, ...) into one file's tensors, keeping each number once."""
    source = next(rows for tag, rows in recorded.items() if tag.endswith("fp32"))
    tensors = {"inputs.x": source["x"], "inputs.dy": source["dy"], "inputs.weight": source["weight"][0],
               "inputs.bias": source["bias"][0], "inputs.factor": torch.tensor([factor(s) for s in range(STEPS)])}
    for tag, rows in recorded.items():
        for name in ("x", "dy"):
            assert torch.equal(source[name].to(rows[name].dtype), rows[name])
        for name, tensor in rows.items():
            if name in ("x", "dy", "weight", "bias"):
                continue
            if name in ("y", "dx", "dw", "db"):
                if not tag.startswith(("delayed_bf16", "delayed_fp32", "current")):
                    continue  # products do not depend on where the scales came from
                tensor = tensor[list(KEPT)]
            if name == "w_codes" and tag.startswith(("delayed_recent", "delayed_e4m3")):
                continue
            tensors[f"{tag}.{name}"] = tensor.contiguous()
    return tensors


def autocast_case():
    """FP32 weights and activations under torch.autocast(bfloat16), two layers: which module updates when."""
    generator = torch.Generator().manual_seed(1)
    layers = torch.nn.Sequential(*(te.Linear(IN, IN, bias=False, params_dtype=torch.float32, device="cuda")
                                   for _ in range(2)))  # fmt: skip
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(IN, IN, generator=generator) * 0.1)
    recipe, rows = DelayedScaling(amax_history_len=4), {}
    rows["weight"] = [layer.weight.detach().cpu().clone() for layer in layers]
    for step in range(6):
        x = torch.randn(TOKENS, IN, generator=generator).mul_(step + 1)
        x = x.to("cuda").requires_grad_()
        with torch.autocast("cuda", torch.bfloat16), te.autocast(enabled=True, recipe=recipe):
            # step 3 leaves the second layer out: its history stays as it is
            y = layers[0](x) if step == 3 else layers(x)
        layers.zero_grad()
        y.float().square().mean().backward()
        rows.setdefault("x", []).append(x.detach().cpu()), rows.setdefault("y", []).append(y.detach().cpu())
        for name, grad in (("dx", x.grad), ("dw", layers[0].weight.grad)):  # FP32 tensors of BF16 numbers
            assert torch.equal(grad, grad.bfloat16().float())
            rows.setdefault(name, []).append(grad.bfloat16().cpu())
        for direction in ("fwd", "bwd"):
            for i, layer in enumerate(layers):
                state = layer.fp8_meta[f"scaling_{direction}"]
                rows.setdefault(f"scale_{direction}{i}", []).append(state.scale.cpu().clone())
                rows.setdefault(f"amax_history_{direction}{i}", []).append(state.amax_history.cpu().clone())
    return {name: torch.stack(tensors).contiguous() for name, tensors in rows.items()}


def cast_case():
    """Every BF16 number through both formats at two scales: the cast itself."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).cuda().reshape(256, 256)
    rows = {}
    for name in ("kFloat8E4M3", "kFloat8E5M2"):
        for scale in (0.3,):
            quantizer = te.Float8Quantizer(torch.tensor([scale], device="cuda"), torch.zeros(1, device="cuda"),
                                           getattr(te.DType, name))  # fmt: skip
            quantizer.set_usage(rowwise=True, columnwise=False)
            tag = f"{name}_{scale}"
            rows[f"{tag}_codes"] = quantizer(x)._data.view(torch.uint8).cpu()
            rows[f"{tag}_amax"] = quantizer.amax.cpu()
            noisy = x.clone()
            noisy[~torch.isfinite(noisy)] = 1.0  # current scaling of a finite tensor
            current = te.Float8CurrentScalingQuantizer(getattr(te.DType, name), device=torch.device("cuda"))
            current.set_usage(rowwise=True, columnwise=False)
            small = noisy[noisy.abs() < 100].reshape(-1)[: 32 * 512].reshape(32, 512).contiguous()
            result = current(small)
            rows[f"{name}_current_x"] = small.cpu()
            rows[f"{name}_current_codes"] = result._data.view(torch.uint8).cpu()
            rows[f"{name}_current_scale_inv"] = result._scale_inv.cpu()
    return rows


def blocks(quantizer, tensor):
    """Both directions of a block-scaled tensor, as stored, and what they stand for."""
    quantizer = quantizer.copy()
    quantizer.internal = False
    quantizer.set_usage(rowwise=True, columnwise=True)
    result = quantizer(tensor.detach().contiguous())
    rows = {"codes": result._rowwise_data, "scale_inv": result._rowwise_scale_inv,
            "codes_t": result._columnwise_data, "scale_inv_t": result._columnwise_scale_inv}  # fmt: skip
    return {name: t.detach().clone() for name, t in rows.items()}


def block_case():
    """te.Linear under block scaling: nothing is remembered, so a few unlike inputs are enough."""
    rows = {}
    for tokens, n_in, n_out in ((160, 192, 144), (64, 256, 384)):  # blocks of 128 that are not full, and full ones
        generator = torch.Generator().manual_seed(tokens)
        layer = te.Linear(n_in, n_out, bias=True, params_dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator) * 0.1)
            layer.bias.copy_(torch.randn(n_out, generator=generator) * 0.1)
            layer.weight[n_out // 2 :] *= 40  # blocks of unlike size
        for kind in ("plain", "outlier", "zero", "tiny"):
            x = torch.randn(tokens, n_in, generator=generator)
            dy = torch.randn(tokens, n_out, generator=generator) * 2.0**-9
            if kind == "outlier":
                x[3, 5], dy[7, 2], x[:, 9] = 3000.0, -500.0, x[:, 9] * 100
            if kind == "zero":
                x[: tokens // 2] = 0
                dy.zero_()
            if kind == "tiny":
                x.mul_(1e-30), dy.mul_(1e-36)
            x, dy = x.to("cuda", torch.bfloat16).requires_grad_(), dy.to("cuda", torch.bfloat16)
            tag = f"{tokens}x{n_in}x{n_out}.{kind}"
            layer.weight.grad = layer.bias.grad = None
            try:
                with te.autocast(enabled=True, recipe=Float8BlockScaling()):
                    y = layer(x)
                y.backward(dy)
            except Exception as error:  # noqa: BLE001 - sizes that it refuses are worth knowing too
                print(tag, type(error).__name__, str(error)[:300], flush=True)
                break
            for name, tensor in (("x", x), ("dy", dy), ("weight", layer.weight), ("bias", layer.bias), ("y", y),
                                 ("dx", x.grad), ("dw", layer.weight.grad), ("db", layer.bias.grad)):  # fmt: skip
                if name in ("weight", "bias") and kind != "plain":
                    continue
                rows[f"{tag}.{name}"] = tensor.detach().cpu().clone()
            for name, tensor, quantizer in (("x", x, layer.quantizers["scaling_fwd"][0]),
                                            ("w", layer.weight, layer.quantizers["scaling_fwd"][1]),
                                            ("dy", dy, layer.quantizers["scaling_bwd"][0])):  # fmt: skip
                if name == "w" and kind != "plain":
                    continue
                for part, value in blocks(quantizer, tensor).items():
                    rows[f"{tag}.{name}_{part}"] = value.cpu().contiguous()
    return rows


def mlp_case():
    """LayerNormMLP: two products, norm and activation between; what is saved for the backward pass is recorded."""
    rows = {}
    for tag, make_recipe, (tokens, hidden, ffn), steps, activation in (
        ("delayed", RECIPES["delayed"], (TOKENS, 64, 96), STEPS, "swiglu"),
        ("current", RECIPES["current"], (TOKENS, 64, 96), STEPS, "swiglu"),
        ("block", Float8BlockScaling, (128, 128, 256), 3, "swiglu"),
        ("delayed_gelu", RECIPES["delayed"], (TOKENS, 64, 96), 4, "gelu"),
    ):
        generator = torch.Generator().manual_seed(3)
        gated = activation == "swiglu"
        mlp = te.LayerNormMLP(hidden, ffn, bias=not gated, normalization="RMSNorm", activation=activation,
                              params_dtype=torch.bfloat16, device="cuda")  # fmt: skip
        with torch.no_grad():
            mlp.layer_norm_weight.copy_(1 + 0.2 * torch.randn(hidden, generator=generator))
            mlp.fc1_weight.copy_(torch.randn((1 + gated) * ffn, hidden, generator=generator) * 0.1)
            if not gated:
                mlp.fc1_bias.copy_(torch.randn(ffn, generator=generator) * 0.1)
                mlp.fc2_bias.copy_(torch.randn(hidden, generator=generator) * 0.1)
            mlp.fc2_weight.copy_(torch.randn(hidden, ffn, generator=generator) * 0.1)
        for name, p in mlp.named_parameters():
            rows[f"{tag}.{name}"] = p.detach().cpu().clone()
        recipe, kept = make_recipe(), {}
        for step in range(steps):
            x = torch.randn(tokens, hidden, generator=generator) * 2.0 ** ((step * 5) % 7 - 3)
            dy = torch.randn(tokens, hidden, generator=generator) * 2.0 ** (-((step * 3) % 11))
            if step == OUTLIER:  # the norm hides a large row, not a large value in it
                x[3, 5], dy[7, 2] = 3000.0, -500.0
            if step == ZERO:
                x.zero_(), dy.zero_()
            x, dy = x.to("cuda", torch.bfloat16).requires_grad_(), dy.to("cuda", torch.bfloat16)
            saved = []
            for p in mlp.parameters():
                p.grad = None
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                with te.autocast(enabled=True, recipe=recipe):
                    y = mlp(x)
            y.backward(dy)
            found = dict(x=x, dy=dy)
            if step in KEPT or steps < STEPS:
                found |= dict(y=y, dx=x.grad, **{f"d_{n}": p.grad for n, p in mlp.named_parameters()})
            if step == 1:
                print(tag, [(type(t).__name__, t.dtype, list(t.shape)) for t in saved if t is not None])
            for i, t in enumerate(saved):  # the operands of the two products, as bytes
                if t is not None and t.dtype == torch.uint8 and tokens in t.shape:
                    found[f"saved_{'x'.join(map(str, t.shape))}_{i}"] = t
            for direction in ("fwd", "bwd"):
                state = mlp.fp8_meta[f"scaling_{direction}"]
                if hasattr(state, "scale"):
                    found |= {f"scale_{direction}": state.scale, f"amax_history_{direction}": state.amax_history}
            for name, t in found.items():
                kept.setdefault(name, []).append(t.detach().cpu().clone())
            with torch.no_grad():
                mlp.fc1_weight.mul_(factor(step)), mlp.fc2_weight.mul_(factor(step + 1))
        for name, tensors in kept.items():
            rows[f"{tag}.{name}"] = torch.stack(tensors).contiguous()
        print(tag, {name: list(t[0].shape) for name, t in kept.items()}, flush=True)
    return rows


def layer_case():
    """A Llama's layer as one module."""
    hidden, ffn, heads, groups, batch_size, sequence = 128, 192, 2, 1, 2, 32
    generator = torch.Generator().manual_seed(4)
    layer = te.TransformerLayer(hidden, ffn, heads, num_gqa_groups=groups, bias=False, normalization="RMSNorm",
                                activation="swiglu", attn_input_format="bshd", self_attn_mask_type="causal",
                                hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5,
                                fuse_qkv_params=False, params_dtype=torch.bfloat16, device="cuda")  # fmt: skip
    rope = te.RotaryPositionEmbedding(hidden // heads)(max_seq_len=sequence).to("cuda")
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_((1 if "norm_weight" in name else 0) + 0.1 * torch.randn(p.shape, generator=generator))
    rows = {f"parameter.{n}": p.detach().cpu().clone() for n, p in layer.named_parameters()}
    rows["rope"] = rope.cpu()
    x = torch.randn(batch_size, sequence, hidden, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    dy = torch.randn(batch_size, sequence, hidden, generator=generator).to("cuda", torch.bfloat16)
    rows |= {"x": x.detach().cpu(), "dy": dy.cpu()}
    for tag, recipe in (("bf16", None), ("delayed", RECIPES["delayed"]()), ("current", RECIPES["current"]())):
        for _step in range(3 if tag == "delayed" else 1):  # the first delayed steps have scales of 1
            for t in (x, *layer.parameters()):
                t.grad = None
            with te.autocast(enabled=recipe is not None, recipe=recipe):
                y = layer(x, rotary_pos_emb=rope)
            y.backward(dy)
        rows |= {f"{tag}.y": y.detach().cpu(), f"{tag}.dx": x.grad.cpu()}
        for name, p in layer.named_parameters():
            rows[f"{tag}.grad.{name}"] = p.grad.cpu()
        if tag == "delayed":
            for name, module in layer.named_modules():
                for direction in ("fwd", "bwd"):
                    state = getattr(module, "fp8_meta", {}).get(f"scaling_{direction}")
                    if hasattr(state, "scale"):
                        rows[f"{tag}.{name}.scale_{direction}"] = state.scale.cpu()
                        rows[f"{tag}.{name}.amax_history_{direction}"] = state.amax_history.cpu()
    print(sorted(layer.state_dict()), flush=True)
    return {name: t.contiguous().clone() for name, t in rows.items()}


def parameters_case():
    """FP8 weights: made from a normal initialization, then moved by SGD in place."""
    rows = {}
    for tag, make_recipe in (("delayed", RECIPES["delayed"]), ("current", RECIPES["current"])):
        generator = torch.Generator().manual_seed(5)
        initial = torch.randn(OUT, IN, generator=generator) * 0.1
        with te.quantized_model_init(enabled=True, recipe=make_recipe(), preserve_high_precision_init_val=True):
            layer = te.Linear(IN, OUT, bias=False, params_dtype=torch.bfloat16, device="cuda",
                              init_method=lambda w, initial=initial: w.data.copy_(initial))  # fmt: skip
        weight, recipe = layer.weight, make_recipe()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        rows[f"{tag}.initial"] = weight.get_high_precision_init_val().cpu()
        for step in range(3):
            rows[f"{tag}.codes{step}"] = weight._data.view(torch.uint8).cpu().clone()
            rows[f"{tag}.scale_inv{step}"] = weight._scale_inv.cpu().clone()
            rows[f"{tag}.values{step}"] = weight.dequantize().cpu()
            x = torch.randn(TOKENS, IN, generator=generator).to("cuda", torch.bfloat16)
            dy = torch.randn(TOKENS, OUT, generator=generator).to("cuda", torch.bfloat16)
            optimizer.zero_grad()
            with te.autocast(enabled=True, recipe=recipe):
                y = layer(x)
            y.backward(dy)
            rows |= {f"{tag}.x{step}": x.cpu(), f"{tag}.dy{step}": dy.cpu(), f"{tag}.y{step}": y.detach().cpu(),
                     f"{tag}.dw{step}": weight.grad.detach().cpu()}  # fmt: skip
            optimizer.step()
            state = layer.fp8_meta["scaling_fwd"]
            if hasattr(state, "scale"):
                rows[f"{tag}.scale_fwd{step}"] = state.scale.cpu().clone()
                rows[f"{tag}.amax_history_fwd{step}"] = state.amax_history.cpu().clone()
    return {name: t.contiguous().clone() for name, t in rows.items()}


def errors():
    """What the library says to shapes and recipes that it cannot run."""
    found = {}

    def attempt(name, function):
        try:
            function()
            torch.cuda.synchronize()
            found[name] = "no error"
        except Exception as error:  # noqa: BLE001 - any kind is what we record
            found[name] = f"{type(error).__name__}: {str(error)[:600]}"

    def run(tokens, n_in, n_out, backward=False):
        layer = te.Linear(n_in, n_out, params_dtype=torch.bfloat16, device="cuda")
        x = torch.ones(tokens, n_in, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with te.autocast(enabled=True, recipe=DelayedScaling()):
            y = layer(x)
        if backward:
            y.sum().backward()

    attempt("tokens_7", lambda: run(7, 64, 64))
    attempt("tokens_8", lambda: run(8, 64, 64))
    attempt("tokens_8_backward", lambda: run(8, 64, 64, True))
    attempt("in_24", lambda: run(32, 24, 64))
    attempt("out_20", lambda: run(32, 64, 20))
    attempt("out_24", lambda: run(32, 64, 24))
    attempt("out_24_backward", lambda: run(32, 64, 24, True))
    attempt("dtype", lambda: te.Linear(64, 64, params_dtype=torch.float32, device="cuda")(
        torch.ones(32, 64, dtype=torch.bfloat16, device="cuda")))  # fmt: skip
    from transformer_engine.common import recipe as recipes

    for name in ("Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"):
        attempt(name, lambda name=name: te.autocast(enabled=True, recipe=getattr(recipes, name)()).__enter__())
    def block_sizes(*sizes):
        with te.autocast(enabled=True, recipe=recipes.Float8BlockScaling()):
            layer = te.Linear(sizes[1], sizes[2], params_dtype=torch.bfloat16, device="cuda")
            layer(torch.ones(sizes[0], sizes[1], dtype=torch.bfloat16, device="cuda"))

    for sizes in ((64, 48, 64), (24, 64, 64), (16, 16, 16), (12, 128, 128)):
        attempt("block_" + "x".join(map(str, sizes)), lambda sizes=sizes: block_sizes(*sizes))

    def unclosed():
        region = te.autocast(enabled=True, recipe=DelayedScaling())
        region.__enter__()
        try:
            region.__enter__()
        finally:
            region.__exit__(None, None, None)

    attempt("autocast_twice", unclosed)

    def fp8_weights(inside):
        with te.quantized_model_init(enabled=True, recipe=DelayedScaling() if inside else Float8CurrentScaling()):
            layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
        with te.autocast(enabled=inside, recipe=Float8CurrentScaling()):
            layer(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda"))

    attempt("fp8_weights_outside_autocast", lambda: fp8_weights(False))
    attempt("fp8_weights_other_recipe", lambda: fp8_weights(True))
    for name in ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available", "is_nvfp4_available"):
        found[name] = str(getattr(te, name)(return_reason=True))

    def state_round_trip():
        layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
        with te.autocast(enabled=True, recipe=DelayedScaling()):
            layer(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda"))
        layer.load_state_dict(layer.state_dict())

    attempt("load_state_dict", state_round_trip)
    return found


def main(out):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {
        "transformer_engine": transformer_engine.__version__, "torch": torch.__version__,
        "cuda": torch.version.cuda, "device": torch.cuda.get_device_name(), "steps": str(STEPS),
        "kept": json.dumps(KEPT),
        "special_steps": json.dumps(dict(outlier=OUTLIER, zero=ZERO, evaluation=EVALUATION, tiny=TINY,
                                         infinite=INFINITE)),
    }  # fmt: skip
    recorded = {}
    for name, recipe in RECIPES.items():
        recorded[f"{name}_bf16"] = record(recipe, torch.bfloat16)
        if name in ("delayed", "current"):
            recorded[f"{name}_fp32"] = record(recipe, torch.float32)
    cases = {"linear": lambda: thin(recorded), "autocast": autocast_case, "cast": cast_case, "block": block_case,
             "mlp": mlp_case, "layer": layer_case, "parameters": parameters_case}  # fmt: skip
    for name, case in cases.items():
        path = out / f"te_{name}.safetensors"
        try:
            save_file(case(), path, metadata=metadata)
        except Exception:  # noqa: BLE001 - one case that fails must not cost the others
            traceback.print_exc()
            continue
        print(path.name, path.stat().st_size, flush=True)
    # Last: an autocast that failed to enter may leave the library's global state changed.
    path = out / "te_errors.json"
    path.write_text(json.dumps({**metadata, "found": errors()}, indent=1) + "\n")
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
