"""A file is written whole or not at all, and what the file system refuses is one sentence."""

from __future__ import annotations

import ast
import os

import pytest

from qtutor import QtutorError, files


def test_what_was_written_appears_whole(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with files.whole(target) as partial:
        assert partial.parent == target.parent and not target.exists()
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and os.listdir(target.parent) == ["b.txt"]
    assert files.write_text(target, "newer – ü") == target and target.read_text("utf-8") == "newer – ü"


def test_what_stops_halfway_leaves_the_old_file_and_nothing_else(tmp_path):
    target = files.write_text(tmp_path / "b.txt", "old")
    with pytest.raises(ZeroDivisionError), files.whole(target) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["b.txt"]
    left = tmp_path / "b.txt.0.partial"
    left.write_text("left behind by a process that was killed")
    os.utime(left, (0, 0))
    assert files.write_text(target, "new").read_text() == "new" and os.listdir(tmp_path) == ["b.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.whole(tmp_path / "t") as first:
        first.write_text("first")
        with files.whole(tmp_path / "t") as second:
            second.write_text("sec")
            assert first.read_text() == "first"
        assert (tmp_path / "t").read_text() == "sec"
    assert (tmp_path / "t").read_text() == "first" and os.listdir(tmp_path) == ["t"]


def test_what_the_file_system_refuses_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QtutorError, match="cannot be written .*: choose another folder, or free some space[.]$"):
        files.write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(QtutorError, match="is a folder: give the name of the file"):
        files.write_text(tmp_path, "x")
    with pytest.raises(QtutorError, match="a remedy of its own[.]$"):
        files.write_text(tmp_path / "file" / "below", "x", "a remedy of its own")
    with pytest.raises(QtutorError, match="There is no recording .*none.json': check the path"):
        files.read_json(tmp_path / "none.json", "recording")
    with pytest.raises(QtutorError, match=r"is damaged \(not JSON\)"):
        files.read_json(files.write_text(tmp_path / "bad.json", "{"))
    assert files.read_json(files.write_text(tmp_path / "good.json", '{"a": 1}')) == {"a": 1}


def test_the_root_is_the_projects():
    assert (files.ROOT / "pyproject.toml").is_file() and (files.DATA / "model" / "model.safetensors").is_file()


def test_nothing_else_moves_files_into_place():
    moves = []
    for path in [*(files.ROOT / "qtutor").rglob("*.py"), *(files.ROOT / "tools").rglob("*.py")]:
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8")))
                 if isinstance(node, ast.Call)}  # fmt: skip
        moves += [str(path.relative_to(files.ROOT))] if {"os.replace", "os.rename"} & calls else []
    assert moves == ["qtutor/files.py", "tools/fetch_model.py"]  # the latter moves a folder
