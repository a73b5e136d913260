"""Where ``python -m qtutor model fetch smollm2`` puts SmolLM2-135M-Instruct, a chat model.  Nothing needs it.

:mod:`tools.fetch_model` makes the folder, around a Q4_1 file of somebody else's."""

from pathlib import Path

from .. import corpus

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path | None:
    """The model's Hugging Face folder, with :data:`FILE` in it; None where it was not fetched."""
    place = corpus.cache_dir() / FILE.partition(".")[0]
    return place if (place / FILE).is_file() else None
