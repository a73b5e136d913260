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
- ``te_errors.json``: what the library says to shapes and recipes that it cannot run.
"""

import json
import sys
from pathlib import Path

import torch
import transformer_engine
import transformer_engine.pytorch as te
from safetensors.torch import save_file
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

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
    cases = {"linear": lambda: thin(recorded), "autocast": autocast_case, "cast": cast_case}
    for name, case in cases.items():
        path = out / f"te_{name}.safetensors"
        save_file(case(), path, metadata=metadata)
        print(path.name, path.stat().st_size, flush=True)
    # Last: an autocast that failed to enter may leave the library's global state changed.
    path = out / "te_errors.json"
    path.write_text(json.dumps({**metadata, "found": errors()}, indent=1) + "\n")
    print(path.name, path.stat().st_size)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
