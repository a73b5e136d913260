"""What fake quantization costs: forward and backward of ours, of torchao's and of PyTorch's own operator.

    python bench/bench_fake_quant.py [--device cpu|cuda] [--rows 2048] [--columns 2048] [--rounds 20]
                                     [--json PATH] [--save]

Two kinds of lines.  Where the scale is *found* in the tensor (what QAT of weights does at each step) ours stands beside
torchao's IntxFakeQuantizer and Float8FakeQuantizer.  Where the scale is *given* it stands beside
torch.fake_quantize_per_channel_affine, too, which cannot look for one.  torchao has no fake quantizer of a tensor in
MXFP4: there its MXTensor, to and fro, is compared with our forward alone.

All candidates of a line take turns, so that a noisy machine disturbs all alike; printed are medians, and the median of
the ratios of one round (below 1: ours is faster).  Before that their outputs and gradients are compared.  (Those of
E4M3 differ: torchao differentiates its scale, too; to us a scale found in the tensor is a constant.)

On a GPU: ten calls at a time between two synchronizations, and torch.compile(ours) as well.  GB/s and the share of a
plain copy on the same machine (bytes read and written) are of *kernel* time, that is of a CUDA graph of forward and
backward, played again; a whole call from Python also pays for launches.  Bytes are those of the work: read x, write y;
backward read x and the gradient, write the gradient (five times the tensor; forward only: twice).  A second pass over
the values (to find the scale, or between unfused operations) is time without bytes: it counts against the
implementation.  What torch.compile keeps for its backward pass is a mask of one byte a value: it reads that in place of
x, which in float32 is less than counted, hence shares above 100 %.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from qtutor import fake_quant as fq
from qtutor import formats, lesson, measure, results, ste


def cases(x: torch.Tensor) -> dict[str, dict]:
    """what -> {"ours", "torchao", "torch": functions of x or None, "forward": no backward}."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization import PerRow
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantize_config import Float8FakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer, IntxFakeQuantizer

    def intx(dtype, granularity=None, symmetric=True, **options):
        return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric, **options))

    def given(values: int) -> dict:
        """int4 with `values` values per scale, and the scale known."""
        blocks = x.view(-1, values)
        scale = formats.choose_qparams(*formats.block_range(blocks), "int4")[0]
        as_torch, zeros = scale.flatten().float(), torch.zeros(len(scale), dtype=torch.int32, device=x.device)
        static = intx(torch.int4, group_size=values, is_dynamic=False)
        static(x.detach())  # finds its scale once

        def by_torch(x):
            y = torch.fake_quantize_per_channel_affine(x.view(-1, values), as_torch, zeros, 0, -8, 7)
            return y.view(x.shape)

        shaped = scale.view(len(x), -1)
        return dict(ours=lambda x: ste.fake_quantize(x, shaped, None, -8, 7), torchao=static, torch=by_torch)

    def by_mx(x):
        return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(x.dtype)

    return {
        "int4, per channel": dict(ours=fq.FakeQuantizer("int4"), torchao=intx(torch.int4, "per_channel")),
        "int4, groups of 32": dict(ours=fq.FakeQuantizer("int4", group_size=32),
                                   torchao=intx(torch.int4, group_size=32)),
        "int8, per token, affine": dict(ours=fq.FakeQuantizer("int8", "token", symmetric=False),
                                        torchao=intx(torch.int8, "per_token", symmetric=False)),
        "E4M3, per row": dict(ours=fq.FakeQuantizer("E4M3"),
                              torchao=Float8FakeQuantizer(Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow()))),
        "Q4_0": dict(ours=fq.FakeQuantizer("Q4_0")),
        "MXFP4": dict(ours=fq.FakeQuantizer("MXFP4")),
        "MXFP4, forward only": dict(ours=fq.FakeQuantizer("MXFP4"), torchao=by_mx, forward=True),
        "int4, per channel, scale given": given(x.shape[1]),
        "int4, groups of 32, scale given": given(32),
    }  # fmt: skip


def on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"  # a CPU's caches may hold all of a small tensor


def call(function, x, upstream, forward_only):
    if forward_only:
        with torch.no_grad():
            return function(x), None
    y = function(x)
    return y, torch.autograd.grad(y, x, upstream)[0]


def time_rounds(calls: dict, rounds: int, warmup: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of a call of each candidate; candidates take turns, on a GPU ten calls each.

    On a GPU the ten calls lie between two synchronizations, and the larger of two clocks counts, CUDA events on the
    current stream and the wall: events alone would miss work that a library puts elsewhere.
    """
    repeats = 10 if device == "cuda" else 1
    spent = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, run in calls.items():
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                began = time.perf_counter()
                begin.record()
                for _ in range(repeats):
                    run()
                end.record()
                torch.cuda.synchronize()
                milliseconds = max(1000 * (time.perf_counter() - began), begin.elapsed_time(end))
            else:
                began = time.perf_counter()
                run()
                milliseconds = 1000 * (time.perf_counter() - began)
            if number >= warmup:
                spent[name].append(milliseconds / repeats)
    return spent


def kernel_ms(run) -> float | None:
    """Milliseconds that a GPU works on a call, without what launching it from Python costs."""
    try:
        replay, _ = measure.captured(run)
    except RuntimeError:  # a library that waits for the GPU within a call
        return None
    return measure.time_ms(replay, repeats=50, device="cuda").median_ms


def compiled(function):
    torch._dynamo.reset()  # one quantizer's recompilations are not to count for the next
    return torch.compile(function, dynamic=False)


def bench(x, upstream, what, case, options, copy) -> tuple[dict, dict]:
    """The row and the ratios of one case."""
    forward_only = case.pop("forward", False)
    functions = dict(case)
    if options.compile:
        functions["compiled"] = compiled(case["ours"])
    calls, notes, reference = {}, [], None
    for name, function in functions.items():
        run = lambda function=function: call(function, x, upstream, forward_only)  # noqa: E731
        try:
            y, gradient = run()
            y = y.detach()
            for _ in range(2):
                run()
        except Exception as error:  # what a library does not offer for this dtype or device is a finding
            first = (str(error).strip() or "no message").splitlines()[0]
            notes.append(f"{name}: {type(error).__name__}: {first[:150]}")
            continue
        if reference is None:
            reference = y, gradient
        elif not torch.equal(y, reference[0]):
            off = (y.float() - reference[0].float()).abs()
            share, most = (off > 0).float().mean().item(), (off.max() / reference[0].abs().max()).item()
            notes.append(f"{name}: {share:.2g} of the values differ from ours, by at most {most:.1g} of the largest")
        if gradient is not None:  # torchao multiplies its gradient by the scale and by its inverse: last bits
            close = torch.isclose(gradient, reference[1], rtol=2**-6 if x.dtype == torch.bfloat16 else 1e-5, atol=0)
            if not close.all():
                notes.append(f"{name}: {1 - close.float().mean().item():.2g} of the gradients differ from ours")
        calls[name] = run
    spent = time_rounds(calls, options.rounds, 5 if options.device == "cuda" else 2, options.device)
    median = {name: statistics.median(values) for name, values in spent.items()}
    ratios = {other: statistics.median(a / b for a, b in zip(spent["ours"], spent[other], strict=True))
              for other in spent if other != "ours"}  # fmt: skip
    size = x.element_size()
    least = x.numel() * size * (2 if forward_only else 5)  # read, write; read two, write
    kernel = {name: kernel_ms(calls[name]) for name in ("ours", "compiled") if name in calls and on_gpu(x)}
    speed = {name: least / (kernel.get(name) or ms) / 1e6 for name, ms in median.items()}
    row = dict(device=options.device, shape=f"{x.shape[0]} x {x.shape[1]}", dtype=str(x.dtype).removeprefix("torch."),
               what=what, **{f"{name}_ms": median.get(name) for name in ("ours", "torchao", "torch", "compiled")},
               **{f"{name}_kernel_ms": kernel.get(name) for name in ("ours", "compiled")},
               gb_per_s=speed["ours"], share_of_copy=speed["ours"] / copy,
               compiled_gb_per_s=speed.get("compiled"),
               compiled_share_of_copy=speed["compiled"] / copy if "compiled" in speed else None)  # fmt: skip
    text = "  ".join(f"{ratios[name]:5.2f} x {name}" if name in ratios else " " * (8 + len(name))
                     for name in ("torchao", "torch", "compiled"))  # fmt: skip
    shares = f"{row['share_of_copy']:.0%} of a copy"
    if "compiled" in speed:
        shares += f" (compiled: {speed['compiled'] / copy:.0%})"
    if max(speed.values()) > 1.15 * copy and on_gpu(x):
        notes.append("faster than memory can be: do not believe this line")
    print(f"{what:32s} {median['ours']:8.2f} ms  {text}  {speed['ours']:5.0f} GB/s, {shares}")
    for note in notes:
        print(f"    {note}")
    return row, ratios


def main(argv=None) -> dict:
    """Returns {"<dtype>: <what>": {"torchao" | "torch" | "compiled": ours / theirs}}."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--rows", type=int, help="default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--columns", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: on a GPU both")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--save", action="store_true", help="record the rows as results 'fake_quant_speed'")
    options = parser.parse_args(argv)
    gpu = options.device == "cuda"
    default = 8192 if gpu else 2048
    options.rows, options.columns = options.rows or default, options.columns or default
    options.compile = gpu if options.compile is None else options.compile
    lesson.quiet()

    copy = measure.bandwidth(options.device)["copy_gb_per_s"]
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: a copy moves {copy:.0f} GB/s; {options.rows} x {options.columns}, median of {options.rounds}")
    rows, all_ratios = [], {}
    for dtype in options.dtypes or (["float32", "bfloat16"] if gpu else ["float32"]):
        torch.manual_seed(0)
        x = torch.randn(options.rows, options.columns, device=options.device).to(getattr(torch, dtype))
        upstream = torch.randn_like(x)
        x.requires_grad_()
        print(f"{dtype}, forward and backward: ours, and the ratio of its time to that of ...")
        for what, case in cases(x).items():
            row, ratios = bench(x, upstream, what, case, options, copy)
            rows.append(row)
            all_ratios[f"{dtype}: {what}"] = ratios
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.save:
        print(results.save("fake_quant_speed", [{"copy_gb_per_s": copy, **row} for row in rows]))
    return all_ratios


if __name__ == "__main__":
    main()
