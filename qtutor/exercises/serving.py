"""Checks of the exercises: serving under load."""

from ..lesson import exercise
from .answers import function, letters, number, several


def _goodput(ttft_ms, itl_ms, seconds, ttft_limit, itl_limit):
    pairs = zip(ttft_ms, itl_ms, strict=True)
    return sum(t is not None and t <= ttft_limit and i <= itl_limit for t, i in pairs) / seconds


@exercise("serving.goodput", solution=_goodput, wrong=[
    lambda t, i, s, a, b: len(t) / s,                                                        # throughput
    lambda t, i, s, a, b: sum(x is not None for x in t) / s,                                 # answered
    lambda t, i, s, a, b: sum(x is not None and x <= a for x in t) / s,                      # one limit
    lambda t, i, s, a, b: sum((x is not None and x <= a) or (y is not None and y <= b)
                              for x, y in zip(t, i, strict=True)) / s,                       # either limit
    lambda t, i, s, a, b: _goodput(t, i, len([x for x in t if x is not None]), a, b),        # a share
    lambda t, i, s, a, b: _goodput(t, i, 1, a, b)])  # fmt: skip
def _check_goodput(answer):
    answer = function(answer, "goodput")
    number(answer([100, 900, 100, 100], [5, 5, 50, 5], 2, 500, 20), 1.0, "Two of four requests keep both limits, "
           "in two seconds.", {2.0: "That is every request, or a count: divide the good ones by the seconds.",
                               1.5: "A request has to keep *both* limits.",
                               0.5: "Divide by the seconds, not by the requests."})  # fmt: skip
    number(answer([100, None], [5, None], 4, 500, 20), 0.25, "A request without an answer (None) is not good.")
    return "A server can raise its throughput and lose its goodput."


def _latencies(service_s, interval_s):
    free, found = 0.0, []
    for number_, service in enumerate(service_s):
        free = max(free, number_ * interval_s) + service
        found.append(free - number_ * interval_s)
    return found


def _no_wait(service_s, interval_s):
    free, found = 0.0, []
    for number_, service in enumerate(service_s):
        free = max(free, number_ * interval_s) + service
        found.append(free)
    return found


@exercise("serving.open_loop", solution=_latencies, wrong=[
    lambda service, interval: list(service),                                  # what a closed loop reports
    lambda service, interval: [s + interval for s in service],
    lambda service, interval: [sum(service[: n + 1]) - n * interval for n in range(len(service))],  # never idle
    _no_wait])  # fmt: skip
def _check_open_loop(answer):
    answer = function(answer, "latencies")
    calm = several(answer([0.1, 0.1, 0.1], 1.0), 3, "three latencies")
    for got in calm:
        number(got, 0.1, "Nobody waits here: each latency is its own service time, from the planned arrival.")
    found = several(answer([0.1, 5.0, 0.1, 0.1], 1.0), 4, "four latencies")
    hint = {0.1: "That is the service time, as a closed loop reports it. Request 2 was planned at 2 s and waits."}
    for n, (got, right) in enumerate(zip(found, _latencies([0.1, 5.0, 0.1, 0.1], 1.0), strict=True)):
        number(got, right, "Request 2 was planned at 2 s, the server is free again at 6 s: the latency counts from the "
               "plan.", hint if n > 1 else {})  # fmt: skip
    return "One stall of the server: a closed loop reports one slow request, its users met three."


_USERS = [17, 14]


@exercise("serving.kv_users", solution=_USERS, wrong=[
    [7, 14], [17, 7], [14, 17], [17, 17], [17.4, 14.1], 17, [34, 28]])  # fmt: skip
def _check_users(answer):
    smaller, cache = several(answer, 2, "two numbers of users")
    number(smaller, 17, "22 GiB less the weights, divided by 8,192 tokens of 128 KiB: whole users only.", {
        7: "That is with weights in 16 bits.", 14: "The first number is with 4-bit weights and a 16-bit cache."})
    number(cache, 14, "22 GiB less the weights in 16 bits, divided by 8,192 tokens of 64 KiB: whole users only.", {
        7: "That is with a cache in 16 bits.", 17: "The second number is with 16-bit weights and an FP8 cache."})
    return "Both buy users. They also add up: 4-bit weights with an FP8 cache hold 34."


@exercise("serving.where", solution="AD", wrong=["A", "ABD", "ACD", "ABCD", "D", "BC", 5])
def _check_where(answer):
    letters(answer, "AD", {
        "A": "A: one user's decoding reads all weights for each token. Fewer bytes are read faster.",
        "B": "B: prefill of a long prompt multiplies large matrices. Weights-only types multiply in 16 bits there.",
        "C": "C: with hundreds of users the products are large, as in prefill, and the weights are read once for all.",
        "D": "D: smaller weights leave more memory for the KV cache: more requests at once."})
    return "Weights-only quantization saves bytes. FP8 weights and activations also save arithmetic: B and C."
