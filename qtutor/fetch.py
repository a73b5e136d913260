"""SmolLM2-135M-Instruct, a real chat model that nothing in the course needs: where ``python -m qtutor model fetch
smollm2`` (:mod:`tools.fetch_model`) puts the Q4_1 file that somebody made of it, in a Hugging Face folder of the same."""

from pathlib import Path

from . import corpus

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path | None:
    """The model's Hugging Face folder, with :data:`FILE` in it; None where it was not fetched."""
    place = corpus.cache_dir() / FILE.partition(".")[0]
    return place if (place / FILE).is_file() else None
