"""The evaluation text, which is pinned; the training text, which shares nothing with it; tokens and batches."""

import inspect
import re
import warnings
from pydoc_data import topics

import numpy as np
import pytest
import torch

from qtutor import QtutorError, corpus, course_model


@pytest.fixture
def fresh():
    """eval_text() keeps its result: forget it before and after."""
    corpus.eval_text.cache_clear()
    yield
    corpus.eval_text.cache_clear()


def test_eval_text_is_the_pinned_one(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = corpus.eval_text()
    assert corpus.fingerprint(text) == "a22cf1ad9a10" and len(text) == 210_661
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) and "for" in text


def test_eval_text_does_not_depend_on_what_a_python_adds(fresh, monkeypatch):
    """Another Python has other topics, in another order, with more in them: what is scored stays the same."""
    new = "A new paragraph.\r\n\r\n{}\n\nA new last one."
    more = {name: new.format(text) for name, text in topics.topics.items()}
    monkeypatch.setattr(topics, "topics", dict(reversed({**more, "aaa": "A new topic."}.items())))
    assert corpus.fingerprint(corpus.eval_text()) == "a22cf1ad9a10"


def test_a_python_that_lacks_a_paragraph_says_so(fresh, monkeypatch):
    whole = corpus.eval_text()
    corpus.eval_text.cache_clear()
    changed = {name: text.replace("iterate", "go") for name, text in topics.topics.items()}
    monkeypatch.setattr(topics, "topics", changed)
    with pytest.warns(UserWarning, match="lacks .* do not compare its scores"):
        text = corpus.eval_text()
    assert len(text) < len(whole) and corpus.fingerprint(text) != corpus.fingerprint(whole)


def test_docstrings_are_what_help_shows():
    source = 'def f():\n    """One line.\n\n    ' + "word " * 30 + '\n    """\n'
    namespace = {}
    exec(source, namespace)
    assert corpus.docstrings(source) == [inspect.getdoc(namespace["f"])]
    assert corpus.docstrings("def broken(:") == []


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def test_training_documents_share_no_thirteen_words_with_the_evaluation_text(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUTOR_CACHE", str(tmp_path))
    documents = corpus.train_documents(packages=["tqdm", "json"], progress=False)
    assert len(documents) > 20 and len(set(documents)) == len(documents)
    evaluation = " ".join(words_of(corpus.eval_text()))
    for text in documents:
        words = words_of(text)
        for i in range(len(words) - corpus.OVERLAP_WORDS + 1):
            assert " ".join(words[i : i + corpus.OVERLAP_WORDS]) not in evaluation
    assert corpus.train_documents(packages=["tqdm", "json"], progress=False) == documents  # from the cache
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUTOR_CACHE", str(tmp_path))
    first = corpus.train_documents(packages=["tqdm"], progress=False)
    next(tmp_path.glob("*.json")).write_text('["half of a')
    assert corpus.train_documents(packages=["tqdm"], progress=False) == first


def test_an_overlapping_document_is_dropped(tmp_path, monkeypatch):
    stolen = " ".join(corpus.eval_text().split()[100:130])
    (tmp_path / "stolen.py").write_text(f'"""{stolen!r} and more"""\n')
    monkeypatch.setattr(corpus, "_source_files", lambda packages: [tmp_path / "stolen.py"])
    assert corpus._text_of_packages(None, False) == []


def test_unknown_packages_and_too_little_text_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUTOR_CACHE", str(tmp_path))
    with pytest.raises(QtutorError, match="installed"):
        corpus.train_documents(packages=["no_such_package_xyz"])
    with pytest.raises(QtutorError, match="too few"):
        next(corpus.batches(np.zeros(100, np.uint16), 8, 64))


def test_batches_are_repeatable_and_are_windows_of_the_text():
    ids = np.arange(5000, dtype=np.uint16)
    first = [b for b, _ in zip(corpus.batches(ids, 4, 32, seed=3), range(100), strict=False)]
    again = [b for b, _ in zip(corpus.batches(ids, 4, 32, seed=3), range(100), strict=False)]
    other = next(corpus.batches(ids, 4, 32, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other)
    for batch in first:
        assert batch.shape == (4, 33) and batch.dtype == torch.int64
        assert (batch.diff(dim=1) == 1).all()


def test_documents_begin_with_end_of_text():
    tokenizer = course_model.load_tokenizer()
    ids = corpus.tokens(["first text", "second text"], tokenizer)
    assert ids.dtype == np.uint16 and ids[0] == 0 and (ids == 0).sum() == 2
    assert tokenizer.decode(corpus.tokens("just text", tokenizer)) == "just text"
