"""record_training, as far as no GPU is needed: the arms and what has been recorded."""

import pytest
import torch

from qtutor import results
from qtutor.rigs import fp8_layers
from tools import record_training


def test_fp8_arms_run_the_recipes_of_the_ladder():
    recipes = {arm["te"].get("recipe") for arm in record_training.ARMS.values() if "te" in arm}
    assert recipes == {how.get("recipe") for how in fp8_layers.RUNGS.values()} | {"block"}
    assert {"Hugging Face BF16", "TE BF16"} <= set(record_training.ARMS)


@pytest.mark.parametrize("name", record_training.RECORDS)
def test_recorded_results_are_consistent(name):
    frame = results.load(name, "h100").frame()
    arms = record_training.ARMS if name == "fp8_model" else record_training.TUNED
    assert set(frame["rung"]) == {*arms, *(["TE BF16 (again)"] if name == "fp8_model" else [])}
    ran = frame[frame["ms_per_step"].notna()]
    rate = 1000 * ran["tokens"] / ran["ms_per_step"]
    assert ran["train_tokens_per_s"].to_numpy() == pytest.approx(rate.to_numpy(), rel=1e-3)
    assert (ran["peak_gib"] > 0).all() and (ran["tokens"] == ran["batch"] * ran["sequence"]).all()
    whole = ran[ran["layers"] == ran["layers"].max()]
    assert (whole["ms_per_step"] * whole["repeats"] > 9000).all()  # energy windows of ten seconds


@pytest.mark.gpu
def test_a_step_of_each_arm_trains():
    """One layer, few tokens: the loss of the same batch falls, in every arm that needs no other package."""
    fp8_layers.require_fp8()  # first, as the recorder does: cuDNN is loaded by whoever comes first, and TE's must fit
    for name, arm in record_training.ARMS.items():
        parameters, _, step = record_training.build("Llama-2-7B", 1, arm, 1, 128)
        before = parameters[-1].detach().float().sum().item() if "FP8 weights" not in name else None
        step()
        torch.cuda.synchronize()
        assert before is None or parameters[-1].detach().float().sum().item() != before, name
        del parameters, step
        torch._dynamo.reset()
        fp8_layers.free()
