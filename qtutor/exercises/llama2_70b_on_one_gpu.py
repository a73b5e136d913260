"""Checks of the exercises: Llama-2-70B on one GPU."""

from ..decide import capacity
from ..lesson import exercise, expect
from .answers import function, number, several


def _cache_gib(width, values=2, layers=126, kv_heads=8, unit=2**30):
    return values * layers * kv_heads * 128 * width * 32768 / unit


@exercise("llama2_70b_on_one_gpu.kv_cache", solution=[_cache_gib(2), _cache_gib(1)], wrong=[
    [_cache_gib(1), _cache_gib(2)],
    [_cache_gib(2, values=1), _cache_gib(1, values=1)],              # keys without values
    [_cache_gib(2, layers=1), _cache_gib(1, layers=1)],              # one layer
    [_cache_gib(2, unit=1e9), _cache_gib(1, unit=1e9)],              # GB
    [_cache_gib(2), _cache_gib(2)], 15.75, "15.75, 7.875"])  # fmt: skip
def _kv_cache(answer):
    wide, narrow = several(answer, 2, "two numbers, in GiB,")
    right = _cache_gib(2)
    number(wide, right, "2 x 126 layers x 8 heads x 128 values x 2 bytes, for each of 32768 tokens.", {
        right / 2: "Keys *and* values are kept, and F16 takes two bytes for each value.",
        right / 126: "Every one of the 126 layers keeps keys and values of its own.",
        right * 2**30 / 1e9: "That is in GB, of 10^9 bytes: a GiB has 2^30."}, within=1e-3)
    number(narrow, right / 2, "FP8 takes one byte for each value: half of F16.", within=1e-3)
    return "A single long conversation takes as much memory as a small model."


@exercise("llama2_70b_on_one_gpu.largest_type", solution=["Q6_K", "Q8_0"], wrong=[
    ["Q8_0", "Q8_0"], ["Q6_K", "Q6_K"], ["Q5_K_M", "Q8_0"], ["Q4_K_M", "Q6_K"], ["Q8_0", "Q6_K"], "Q6_K",
    ["F16", "F16"]])  # fmt: skip
def _largest(answer):
    given = [str(name).upper() for name in several(answer, 2, "two types, as strings,")]
    choices = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
    expect(set(given) <= set(choices), f"Choose from {', '.join(choices)}.")
    expect(given != ["Q8_0", "Q8_0"], "The first does not fit: have you asked for 16 users with 8192 tokens each?")
    for mine, cache in zip(given, ("F16", "Q8_0"), strict=True):
        best = next(t for t in choices if capacity.fits("Llama-3-8B", t, 8192, "RTX 4090", cache, users=16).fits)
        off = choices.index(mine) - choices.index(best)
        expect(off >= 0, f"With a cache in {cache}, {mine} does not fit.")
        expect(off <= 0, f"With a cache in {cache}, there is room for a larger type than {mine}.")
    return "With many users the cache decides: halving *its* bytes bought two bits for each weight."


def _ceiling_solution(read_bytes, kv_bytes_per_token, cached, users, gb_per_s):
    return users * gb_per_s * 1e9 / (read_bytes + users * cached * kv_bytes_per_token)


@exercise("llama2_70b_on_one_gpu.ceiling", solution=_ceiling_solution, wrong=[
    lambda w, kv, cached, users, speed: speed * 1e9 / (w + users * cached * kv),            # steps, not tokens
    lambda w, kv, cached, users, speed: users * speed * 1e9 / (w + cached * kv),            # one user's cache
    lambda w, kv, cached, users, speed: users * speed * 1e9 / (users * w + users * cached * kv),  # weights for each
    lambda w, kv, cached, users, speed: users * speed * 1e9 / w,                            # no cache
    lambda w, kv, cached, users, speed: users * speed * 2**30 / (w + users * cached * kv),  # GiB/s
    lambda w, kv, cached, users, speed: (w + users * cached * kv) / (users * speed * 1e9),  # seconds a token
])  # fmt: skip
def _ceiling(answer):
    answer = function(answer, "tokens_per_s")
    number(answer(50e9, 0, 0, 1, 1000), 20, "50 * 10^9 bytes at 1000 * 10^9 bytes a second: 20 steps a second, a token "
           "each.", {1 / 20: "That is seconds a token: turn it over."})  # fmt: skip
    number(answer(50e9, 0, 0, 4, 1000), 80, "One step reads the weights once and writes four tokens.", {
        20: "Four users get four tokens from one step: the weights are read once for all of them."})
    number(answer(50e9, 1e6, 2000, 1, 1000), 1000 / 52, "A step also reads the cache: cached * kv bytes.")
    number(answer(50e9, 1e6, 2000, 4, 1000), 4000 / 58, "Each user has a cache of their own.")
    return "Three divisions before you rent: memory, speed, price."
