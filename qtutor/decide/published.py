"""What quantizing real models costs, as published: perplexities beside those of the same model in 16 bits.

Measured on our machines are the course model (7 M weights) and SmolLM2 (135 M).  A type's cost depends on the model, so
for a model that somebody else measured, their figure is the one to use.

    [row.loss for row in PUBLISHED if (row.model, row.type) == ("Llama-2-70B", "Q5_K_M")]            # [0.0040]
    loss("Llama-3-8B", "Q4_K_M")                                       # the row, or None: not published

llama.cpp's figures: WikiText-2's test split, llama-perplexity's default window of 512 tokens, no importance matrix.
torchao's: word perplexity of WikiText in lm-evaluation-harness, with HellaSwag's acc_norm.  Perplexities of two rows
are comparable within one model and one source; ``loss``, a ratio, is what may stand beside another model's.
"""

from __future__ import annotations

from dataclasses import dataclass

_GITHUB = "https://github.com"
README = f"{_GITHUB}/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"
K_QUANTS = f"{_GITHUB}/ggml-org/llama.cpp/pull/1684"
TORCHAO = f"{_GITHUB}/pytorch/ao/blob/main/benchmarks/_models/README.md"


@dataclass(frozen=True)
class Published:
    """One model in one type: its ``perplexity`` and its 16-bit ``base``; ``se`` of their ratio and ``kld`` (nats per
    token, mean) where published; ``billions`` of weights; ``hellaswag``: accuracy (of one), and ``hellaswag_base``."""

    model: str
    billions: float
    type: str
    perplexity: float
    base: float
    source: str
    se: float | None = None
    kld: float | None = None
    hellaswag: float | None = None
    hellaswag_base: float | None = None

    @property
    def loss(self) -> float:
        """Relative growth of the perplexity: 0.012 is 1.2 %."""
        return self.perplexity / self.base - 1


def _rows(model: str, billions: float, base: float, source: str, types: str) -> list[Published]:
    """Rows of ``types``: words "type:perplexity[:se of the ratio:KLD]"."""
    found = []
    for word in types.split():
        kind, value, *more = word.split(":")
        se, kld = (float(x) if x else None for x in (more or ["", ""]))
        found.append(Published(model, billions, kind, float(value), base, source, se, kld))
    return found


# The README's column "L2 7b q2_K" repeats the base's perplexity: ours is the base times the ratio in the next line.
PUBLISHED = (
    *_rows("LLaMA-1-7B", 6.7, 5.9066, K_QUANTS, "Q2_K:6.7764 Q3_K_M:6.1503 Q4_K_S:6.0215 Q4_K_M:5.9601 Q5_K_S:5.9419 "
           "Q5_K_M:5.9208 Q6_K:5.9110"),
    *_rows("LLaMA-1-13B", 13.0, 5.2543, K_QUANTS, "Q2_K:5.8545 Q3_K_M:5.4498 Q4_K_S:5.3404 Q4_K_M:5.3002 Q5_K_S:5.2785 "
           "Q5_K_M:5.2638 Q6_K:5.2568"),
    *_rows("Llama-2-7B", 6.7, 5.794552, README, "Q2_K:6.420103:0.001427:0.108903 Q4_K_M:5.877078:0.000432:0.012686 "
           "Q6_K:5.808494:0.000191:0.002098 Q8_0:5.798542:0.000107:0.000369"),
    *_rows("Llama-2-70B", 69.0, 3.4313, README, "Q2_K:3.7339 Q3_K_M:3.5932 Q4_0:3.5550 Q4_K_S:3.4852 Q4_K_M:3.4725 "
           "Q5_0:3.4744 Q5_K_S:3.4483 Q5_K_M:3.4451 Q6_K:3.4367"),
    *_rows("Llama-3-8B", 8.0, 6.231634, README, "Q2_K:9.751568:0.004525:0.445132 Q3_K_M:6.888498::0.101913 "
           "Q4_0:6.700147::0.071940 Q4_K_S:6.500529::0.043136 Q4_K_M:6.407115:0.000723:0.031273 "
           "Q5_0:6.363224::0.022239 Q5_K_S:6.336598::0.016595 Q5_K_M:6.288607::0.010762 "
           "Q6_K:6.253382:0.000296:0.005452 Q8_0:6.234284:0.000161:0.001355"),
    *[Published(model, billions, kind, perplexity, base, TORCHAO, hellaswag=hellaswag / 100, hellaswag_base=at / 100)
      for model, billions, base, at, types in (
          ("Llama-3.1-8B", 8.0, 7.33, 78.84, (("INT4", 8.25, 77.06), ("INT8 weight-only", 7.34, 78.95),
           ("INT8 dynamic", 7.45, 78.82), ("FP8 weight-only", 7.37, 78.61), ("FP8 dynamic", 7.41, 78.57))),
          ("Llama-3.2-3B", 3.2, 9.26, 73.70, (("INT4", 10.36, 71.31), ("INT8 weight-only", 9.28, 73.44),
           ("INT8 dynamic", 9.43, 73.29), ("FP8 weight-only", 9.31, 73.58), ("FP8 dynamic", 9.33, 73.37))))
      for kind, perplexity, hellaswag in types],
)  # fmt: skip


def loss(model: str, type: str) -> Published | None:
    """The row of a model in a type, or None where nobody published one."""
    return next((row for row in PUBLISHED if (row.model, row.type) == (model, type)), None)
