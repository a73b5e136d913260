"""QTUTOR_MODEL: the notebooks with somebody else's model, and what ``course_model.only`` says where one cannot."""

import json
import os

import families
import nbformat
import pytest
from nbclient import NotebookClient

from qtutor import course_model, files
from tools.train_course_model import train_tokenizer

NOTEBOOKS = sorted((files.ROOT / "notebooks").glob("*.ipynb"))
SMALL = dict(vocab_size=608, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=3, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
             tie_word_embeddings=False)  # fmt: skip
OTHERS = {"llama": dict(model_type="llama", attention_bias=True, mlp_bias=True), "qwen2": dict(model_type="qwen2")}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders with tiny random models that share little with the course model, each with a tokenizer of its own."""
    made = {}
    for name, config in OTHERS.items():
        made[name] = families.save(SMALL | config, tmp_path_factory.mktemp("others") / name)
        train_tokenizer(["Some words to train on.", "def f(x): return x"] * 9, made[name], vocab_size=300)
    return made


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A tiny Qwen2 with the real one's vocabulary; skips where that, or llama.cpp's converter, is not installed."""
    vocabularies = pytest.importorskip("vocabularies")
    families.converter()
    if not vocabularies.available("qwen2"):
        pytest.skip("the vocabulary files are not installed: python -m tools.llamacpp_source --vocabularies")
    from transformers import PreTrainedTokenizerFast

    tok, special, tokens = vocabularies.byte_level("qwen2")
    sizes = dict(vocab_size=len(tokens), hidden_size=64, intermediate_size=256, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    config = SMALL | OTHERS["qwen2"] | sizes | {key: at for key, at in special.items() if key in SMALL}
    folder = families.save(config, tmp_path_factory.mktemp("others") / "real-words")
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def run(topic: str, folder, upto: str) -> str:
    """Execute a notebook of the course with another model, up to the first cell that holds ``upto``; what it prints."""
    (path,) = [path for path in NOTEBOOKS if path.stem.partition("_")[2] == topic]
    notebook = nbformat.read(path, 4)
    last = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and upto in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    before = os.environ.get("QTUTOR_MODEL")
    os.environ["QTUTOR_MODEL"] = str(folder)
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        os.environ.pop("QTUTOR_MODEL") if before is None else os.environ.update(QTUTOR_MODEL=before)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"]
    return "".join(out.text for out in outputs if out.name == "stdout")


@pytest.mark.slow
@pytest.mark.parametrize("topic, upto", [
    ("fp8_scaling", "caught ="), ("qat", "def evaluated"), ("ptq_llamacpp", "precise.tokenize"),
    ("measuring_the_tradeoff", "tradeoff.Reference"),  # the others run with it, too: each costs the suite ten seconds
])  # fmt: skip
def test_a_llama_of_other_sizes(topic, upto, others):
    assert "goes on with the course model" not in run(topic, others["llama"], upto)


@pytest.mark.slow
def test_another_family(others):
    assert "goes on with the course model" not in run("ptq_fundamentals", others["qwen2"], "def watch")


@pytest.mark.slow
def test_another_family_in_llama_cpp(qwen2):
    assert "goes on with the course model" not in run("ptq_llamacpp", qwen2, "precise.tokenize")


@pytest.mark.slow
def test_what_a_notebook_cannot_do_it_says_and_goes_on(others):
    said = run("fp8_training", others["qwen2"], "swap_linears(course_model.load")
    assert "QTUTOR_MODEL is a qwen2, and this notebook copies a plain Llama" in said


PLAIN = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=1)


@pytest.mark.parametrize("config, options, words", [
    (PLAIN, dict(plain=True), ""),
    (PLAIN | {"head_dim": 32}, {}, ""),
    (PLAIN | {"head_dim": 32}, dict(plain=True), "a llama with heads of another size,"),
    (PLAIN | {"mlp_bias": True}, dict(plain=True), "a llama with biases,"),
    (PLAIN | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, dict(plain=True), "a llama with scaled RoPE,"),
    (PLAIN, dict(multiple=32), ""),
    (PLAIN, dict(multiple=256), "with no rows of 256 n,"),
    (PLAIN | {"model_type": "phi3"}, {}, "a phi3, and this notebook counts: it goes on with the course model."),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, {}, "a gemma3_text,"),
])  # fmt: skip
def test_only(config, options, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("QTUTOR_MODEL", str(tmp_path))
    assert course_model.name() == tmp_path.name
    course_model.only(("llama", "mistral"), "counts", **options)
    said = capsys.readouterr().out
    assert words in said and said.count("\n") == bool(words)
    assert (course_model.model_dir() == course_model.MODEL_DIR) == bool(words)
    course_model.only((), "refuses all")
    course_model.only((), "refuses all")  # but not the course model
    assert course_model.name() == "course model" and capsys.readouterr().out.count("\n") == (not words)
