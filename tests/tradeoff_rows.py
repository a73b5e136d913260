"""Rows of a trade-off that was never measured, for the tests of fronts and pictures."""

from qtutor.decide.techniques import TECHNIQUES


def row(technique, family, size, kld, speed, batch=1, **more):
    """One row; quality and speed come with errors of 5 and 10 %."""
    runtime = TECHNIQUES[technique].runtime if technique in TECHNIQUES else "pytorch"
    spread = speed and {"decode_tokens_per_s_low": 0.9 * speed, "decode_tokens_per_s_high": 1.1 * speed}
    return {"technique": technique, "family": family, "runtime": runtime, "shape": "course", "batch": batch,
            "weights_mb": size, "kld_mean": kld, "kld_mean_se": kld / 20, "decode_tokens_per_s": speed,
            "joules_per_decode_token": 1.0, "joules_per_decode_token_low": 0.9,
            "joules_per_decode_token_high": 1.1} | (spread or {}) | more  # fmt: skip


def some_rows():
    return [row("FP32", "float", 28, 0.0, 100), row("BF16", "float", 14, 1e-5, 200),
            row("GGUF Q8_0", "gguf", 8, 1e-3, 400), row("GGUF Q4_K_M", "gguf", 5, 0.05, 500),
            row("GGUF Q4_0", "gguf", 4.9, 0.0502, 600),
            row("slow and worse", "torchao", 9, 0.2, 50), row("no speed", "fp8", None, 0.02, 1)]  # fmt: skip
