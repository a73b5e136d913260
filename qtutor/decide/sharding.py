"""A model of one training step under FSDP2 on N GPUs: how much of the communication hides behind the compute.

While a layer computes, the next one is gathered and, in the backward pass, the gradient of the one before it
reduce-scattered.  Exposed are the first gather, the last reduce-scatter, the second gather of the last layer (only the
output head could hide it), and what takes longer than the compute beside it.

    sharding.step(64, 147, 10, layers=8, weights=1.6e9).efficiency                  # 0.74: BF16, 400 Gb/s a GPU
    sharding.step(64, 98, 10, layers=8, weights=1.6e9, gather_bytes=1).efficiency   # 0.76: FP8 weights, faster compute

An efficiency above 1 is no error: each rank updates 1/N of the weights, which takes 1/N of the optimizer's time.  Left
out: waiting for the slowest rank, a network shared with others, HSDP, activations that do not fit.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .. import QtutorError
from . import hardware


@dataclass(frozen=True)
class Step:
    """Times of one training step on one rank, in ms; ``compute_ms`` with what communication costs the kernels beside
    it, ``gathered_ms`` and ``scattered_ms`` of all collectives, hidden or not, ``one_gpu_ms`` without sharding."""

    compute_ms: float
    optimizer_ms: float
    exposed_ms: float
    total_ms: float
    gathered_ms: float
    scattered_ms: float
    one_gpu_ms: float

    @property
    def efficiency(self) -> float:
        """Time on one GPU over time on N, each GPU with as many tokens: 1 is perfect weak scaling."""
        return self.one_gpu_ms / self.total_ms

    @property
    def bottleneck(self) -> str:
        """ "compute"; where the collectives together take longer, the longer of "all-gather" and "reduce-scatter"."""
        times = {"all-gather": self.gathered_ms, "reduce-scatter": self.scattered_ms}
        return "compute" if self.compute_ms >= sum(times.values()) else max(times, key=times.get)


def ring_ms(gb: float, ranks: int, gb_per_s: float, hop_us: float = 5.0) -> float:
    """Time in ms of a ring all-gather or reduce-scatter of ``gb`` (10^9 bytes, all shards): N-1 hops, 1/N in each."""
    return 1000 * (ranks - 1) / ranks * gb / gb_per_s + (ranks - 1) * hop_us / 1000


def adam_ms(weights: float, device="H200") -> float:
    """Estimated ms of Adam on one GPU: 28 bytes a weight (FP32: it and two moments; BF16: it, its gradient)."""
    return 28 * weights / hardware.device(device).gb_per_s / 1e6


def step(ranks: int, compute_ms: float, optimizer_ms: float, *, layers: int, weights: float, gather_bytes: float = 2.0,
         reshard: bool = True, gb_per_s: float = 450.0, between_hosts_gb_per_s: float = 50.0, gpus_per_host: int = 8,
         hop_us: float = 5.0, overlap_cost: float = 0.77) -> Step:  # fmt: skip
    """Return the Step of ``ranks`` GPUs from the times on one GPU (ms): a third of ``compute_ms`` is the forward pass.
    ``weights``: numbers in all layers; ``gather_bytes`` of each: 2 BF16, 1 FP8 (gradients: BF16); ``reshard``: gathered
    again for the backward pass.  Bandwidths are one way, a GPU: NVLink 4 by the data sheet, a 400 Gb/s NIC; a ring over
    several hosts runs at the slower one.  ``hop_us``: NCCL's cost model (src/graph/tuning.cc) has 3.4 over NVLink and
    about 10 between hosts; one hop of eight leaves a host.  ``overlap_cost``: ms that compute loses to each GB that
    travels beside it, through SMs, memory bandwidth, power and FSDP's copies; least squares of the relative errors of
    the 36 rows on 2 and 4 H200 in ``fp8_scaling`` (RMS 1.8 %; "as on one GPU": 2.5 %).  QtutorError: sizes not
    above 0.
    """
    sizes = ranks, layers, compute_ms, weights, gather_bytes, gb_per_s, between_hosts_gb_per_s, gpus_per_host
    if not (all(x > 0 for x in sizes) and min(optimizer_ms, hop_us, overlap_cost) >= 0) or ranks % 1 or layers % 1:
        raise QtutorError(f"No step has {ranks!r} ranks, {layers!r} layers and {compute_ms!r} ms of compute: give "
                          "whole ranks and layers, sizes and bandwidths above 0, no negative cost.")  # fmt: skip
    one, layers = compute_ms + optimizer_ms, int(layers)
    if ranks == 1:
        return Step(compute_ms, optimizer_ms, 0.0, one, 0.0, 0.0, one)
    speed = gb_per_s if ranks <= gpus_per_host else min(gb_per_s, between_hosts_gb_per_s)
    gb = gather_bytes * weights / layers / 1e9, 2 * weights / layers / 1e9  # of a layer's gather and scatter
    gather, scatter = (ring_ms(size, ranks, speed, hop_us) for size in gb)
    slots = [(compute_ms / 3 / layers, i > 1, False) for i in range(layers, 0, -1)]  # is there a gather, a scatter?
    slots += [(2 * compute_ms / 3 / layers, reshard and i > 1, i < layers) for i in range(layers, 0, -1)]
    computed, exposed = 0.0, gather * (1 + reshard) + scatter
    for compute, gathers, scatters in slots:
        compute += overlap_cost * (gathers * gb[0] + scatters * gb[1])
        computed += compute
        exposed += max(0.0, gathers * gather + scatters * scatter - compute)
    parts = computed, optimizer_ms / ranks, exposed
    return Step(*parts, sum(parts), layers * gather * (1 + reshard), layers * scatter, one)


def hidden_until(compute_ms: float, optimizer_ms: float, limit=0.9, ranks=(8, 16, 32, 64, 128, 256, 512), **plan):
    """Return the largest of ``ranks`` up to which efficiency is at least ``limit``, else 1; ``plan``: as step's."""
    steps = ((n, step(n, compute_ms, optimizer_ms, **plan)) for n in sorted(ranks))
    return max((n for n, _ in itertools.takewhile(lambda pair: pair[1].efficiency >= limit, steps)), default=1)


def checked(rows, device="H200", **plan) -> list[dict]:
    """Return the model beside each row of ``fp8_scaling`` on several GPUs, predicted from its row on one GPU (rows
    without one are left out): shape, rung, ranks, ms_measured, ms_model, error (model / measured - 1)."""
    rows, found = [row for row in rows if not row.get("not_run")], []
    one_gpu = {(r["shape"], r["rung"], r["layers"]): r["ms_per_step"] for r in rows if r["ranks"] == 1}
    for row in (row for row in rows if row["ranks"] > 1):
        if ms := one_gpu.get((row["shape"], row["rung"], row["layers"])):
            update, reshard = adam_ms(row["trained_weights"], device), "gathered once" not in row["rung"]
            plan |= {"layers": row["layers"], "weights": row["trained_weights"], "reshard": reshard,
                     "gather_bytes": row["gathered_bytes_per_weight"] / (1 + reshard)}  # fmt: skip
            model, ms = step(row["ranks"], ms - update, update, **plan).total_ms, row["ms_per_step"]
            found.append({"shape": row["shape"], "rung": row["rung"], "ranks": row["ranks"],
                          "ms_measured": ms, "ms_model": model, "error": model / ms - 1})  # fmt: skip
    return found
