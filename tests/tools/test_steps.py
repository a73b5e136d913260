"""steps: the refusal without a GPU, and with one the row of a rung."""

import pytest
import torch

from qtutor import QtutorError
from qtutor.rigs import fp8_layers
from tools import steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("call", [steps.ladder, lambda: steps.measure_rung(None, "TE BF16", 1.0)])
def test_without_a_gpu_the_measurements_refuse_in_one_sentence(call):
    with pytest.raises(QtutorError, match="need a GPU with FP8 units") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_rung_is_measured():
    shape = fp8_layers.Shape("tiny", 256, 768, 4, 2, 2, 128)
    for rung in ("Hugging Face BF16", "TE BF16", "TE FP8 delayed + FP8 weights", "TE BF16 + CUDA graph"):
        try:
            row = steps.measure_rung(shape, rung, seconds=0.05)
        except QtutorError as error:
            pytest.skip(str(error))
        assert 0 < row["ms_p10"] <= row["ms_per_step"] <= row["ms_p90"] and row["repeats"] >= 5 and row["peak_gib"] > 0
