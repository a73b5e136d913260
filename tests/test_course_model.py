"""The tokenizer and the course model: what is shipped, and what is refused."""

import json
import math
import re
import shutil

import pytest
import torch

from qtutor import QtutorError, corpus, course_model

TRICKY = "naïve 😀 café\r\n\tdef f(x):\n        return  x<|endoftext|> ÿ\x00 日本語  end "


@pytest.fixture(scope="module")
def tokenizer():
    return course_model.load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return course_model.load()


def test_tokenizer_is_lossless_and_knows_its_special_token(tokenizer):
    ids = tokenizer(TRICKY, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == TRICKY
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0 and 0 in ids
    assert len(tokenizer) == course_model.VOCABULARY


def test_the_shipped_model_is_small_safe_and_the_right_shape(model):
    files = {p.name: p.stat().st_size for p in course_model.MODEL_DIR.iterdir()}
    assert files["model.safetensors"] <= 16e6 and sum(files.values()) < 17e6
    assert not [n for n in files if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    for name, p in model.named_parameters():
        assert p.ndim == 1 or (p.shape[-1] % 256 == 0 and p.shape[0] % 16 == 0), name
    from safetensors import safe_open

    with safe_open(course_model.MODEL_DIR / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}


def test_the_model_card_tells_what_the_log_holds():
    info = json.loads((course_model.MODEL_DIR / "training.json").read_text())
    card = (course_model.MODEL_DIR / "README.md").read_text()
    assert f"**{info['bits_per_byte']['model']:.3f}**" in card and info["precision_words"] in card
    assert info["tokens"] == info["steps"] * info["batch_size"] * info["seq_len"] == info["log"][-1]["tokens"]
    assert info["log"][0]["loss"] > info["log"][-1]["loss"]


@pytest.mark.slow
def test_the_course_model_is_worth_quantizing(model, tokenizer):
    """Better than gzip -9 and xz -9 on text it never saw, and near what its card says."""
    # A slice is enough to tell a trained model from a broken one; the card's figure is for the whole text.
    text = corpus.eval_text()[:60_000]
    bits = course_model.bits_per_byte(model, tokenizer, text)
    card = json.loads((course_model.MODEL_DIR / "training.json").read_text())["bits_per_byte"]["model"]
    assert bits["model"] < bits["xz"] and bits["model"] < bits["gzip"]
    assert abs(bits["model"] - card) < 0.25


def test_bits_per_byte_of_a_uniform_model_is_its_vocabulary(tokenizer):
    fresh = course_model.new_model(num_hidden_layers=1)
    for p in fresh.parameters():
        p.data.zero_()
    text = "x = 1\n" * 500
    bits = course_model.bits_per_byte(fresh, tokenizer, text)
    tokens = len(corpus.tokens(text, tokenizer))
    assert math.isclose(bits["model"], math.log2(4096) * tokens / len(text), rel_tol=1e-5)


@pytest.mark.parametrize("prompt, options", [("", {}), ("caf\udce9", {}), ("hi", {"max_tokens": 0})])
def test_what_cannot_be_completed_is_one_sentence(model, tokenizer, prompt, options):
    with pytest.raises(QtutorError) as error:
        course_model.complete(prompt, model, tokenizer, **options)
    one_sentence(error)


def test_completion_makes_sense(model, tokenizer):
    text = course_model.complete("The for statement is used to", model, tokenizer, max_tokens=24)
    assert text.startswith("The for statement is used to ")
    words = re.findall(r"[a-z0-9]+", text.lower())[6:]
    assert len(words) >= 5 and len(set(words)) >= 0.4 * len(words)  # no babble, no loop


def test_new_models_depend_on_the_seed_alone():
    a, b, c = (course_model.new_model(seed, num_hidden_layers=1).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_another_model_can_be_swapped_in_by_folder(tmp_path, monkeypatch, tokenizer):
    other = course_model.new_model(seed=5, num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("QTUTOR_MODEL", str(tmp_path))
    loaded = course_model.load()
    assert loaded.config.hidden_size == 128 and course_model.model_dir() == tmp_path
    assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)
    assert course_model.load_tokenizer()("for")["input_ids"] == tokenizer("for")["input_ids"]


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


@pytest.mark.slow
def test_missing_and_damaged_models_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUTOR_MODEL", str(tmp_path / "nowhere"))
    for call in (course_model.load, course_model.load_tokenizer):
        with pytest.raises(QtutorError) as error:
            call()
        assert "QTUTOR_MODEL" in one_sentence(error)
    broken = tmp_path / "broken"
    shutil.copytree(course_model.MODEL_DIR, broken)
    monkeypatch.setenv("QTUTOR_MODEL", str(broken))
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:1000], whole[:-1000], b"\xff" * 8 + whole[8:], whole[:20] + b"\x00\x01" + whole[22:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(QtutorError) as error:
            course_model.load()
        assert "damaged" in one_sentence(error)
    weights.write_bytes(whole[:-2] + b"\x80\x7f")  # an infinity in bfloat16
    with pytest.raises(QtutorError) as error:
        course_model.load()
    assert "finite" in one_sentence(error)
    (broken / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(QtutorError) as error:
        course_model.load_tokenizer()
    one_sentence(error)
    monkeypatch.setenv("QTUTOR_MODEL", "someone/no-such-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read once, at import
    with pytest.raises(QtutorError) as error:
        course_model.load()
    one_sentence(error)
