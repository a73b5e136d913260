"""Editions: what students do not get, what teachers get, programmes that fit their hours."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import nbformat
import pytest

from qtutor import QtutorError, files
from tools import editions, notebooks, topic

PROGRAMMES = json.loads((editions.DOCS / "programmes.json").read_text("utf-8"))


@pytest.mark.parametrize("name", notebooks.names())
def test_parts_cover_a_notebook_and_take_its_minutes(name):
    parts = editions.parts(name)
    assert sum(part.minutes for part in parts) == pytest.approx(editions.minutes(name))
    assert all(part.minutes > 0 for part in parts)
    last = len(json.loads(notebooks.find(name).read_text("utf-8"))["cells"]) - 2  # the first and the last are links
    assert (parts[0].first, parts[-1].last) == (1, last)
    assert all(after.first == before.last + 1 for before, after in pairwise(parts))


@pytest.mark.parametrize("programme", PROGRAMMES, ids=lambda programme: programme["title"])
def test_a_programme_fits_its_hours(programme):
    minutes = sum(part.minutes for _, there in editions.chosen(programme) for part in there)
    assert 0.85 * 60 * programme["hours"] <= minutes <= 60 * programme["hours"]


def test_programmes_are_there_for_two_four_and_eight_hours():
    assert {programme["hours"] for programme in PROGRAMMES} == {2, 4, 8}
    text = editions.programmes()
    assert all(programme["title"] in text for programme in PROGRAMMES)
    with pytest.raises(QtutorError, match="no part that begins with"):
        editions.chosen({"parts": [["qat", ["No such heading"]]]})


def test_students_get_exercises_without_solutions(tmp_path):
    for path in editions.write(editions.student, tmp_path):
        nb, original = nbformat.read(path, 4), notebooks.find(path.name)
        assert "Solution</summary>" not in str(nb) and not any(cell.get("outputs") for cell in nb.cells)
        for hint in ("Hint 1</summary>", "Hint 2</summary>"):
            assert str(nb).count(hint) == len(notebooks.exercises(original))
        asked = [cell for cell in nb.cells if "exercise" in notebooks.tags(cell)]
        assert len(asked) == len({one.cell for one in notebooks.exercises(original)})
        nbformat.validate(nb)
        for one in notebooks.exercises(original):
            assert one.solution.strip() not in "\n".join(cell.source for cell in nb.cells)


@pytest.mark.slow
def test_teachers_get_solutions_minutes_mistakes_and_questions(tmp_path):
    ask = json.loads((editions.DOCS / "questions.json").read_text("utf-8"))
    assert set(ask) == {topic(name) for name in notebooks.names()}
    for path in editions.write(editions.instructor, tmp_path):
        text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells)
        assert all(question in text for question in ask[topic(path)])
        assert "| part | cells | minutes |" in text and "<details open>" in text
        for one in notebooks.exercises(notebooks.find(path.name)):
            assert one.solution in text
            assert all(f"- {reply}" in text.replace("\\*", "*") for reply in editions.replies(one.name)), one.name


def test_replies_to_wrong_answers_are_the_checks_own():
    said = editions.replies("number_formats.decode")
    assert len(said) == len(set(said)) > 3 and any("subnormal" in reply for reply in said)


@pytest.mark.slow
def test_slides_need_no_network(tmp_path):
    path = notebooks.find("number_formats")
    out = editions.deck(path, tmp_path)
    html = out.read_text("utf-8")
    assert html.count("<section") > 15 and "reveal" in html and "qtutor.lesson.check" not in html
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=[\"'](?:https?:)?//", html)
    assert not re.search(r"url\([\"']?https?:|require\(\s*\{|from [\"']https?:", html)
    needed = re.findall(r"<(?:script|link)[^>]*(?:src|href)=[\"']([^\"'#:]+)[\"']", html)
    assert needed and all((out.parent / name).is_file() for name in needed)
    themes = [(out.parent / name).read_text("utf-8") for name in needed if "theme" in name]
    assert themes and not any(re.search(r"(?:url\(|import )[\"']?https?:", text) for text in themes)
    parts = [cell for cell in editions.slides(nbformat.read(path, 4), path).cells if "slideshow" in cell.metadata]
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in parts]
    assert kinds.count("slide") >= len(editions.parts(path.stem)) - 1 and "-" in kinds


def test_no_folder_is_asked_for(capsys):
    assert editions.main([]) == 0 and capsys.readouterr().out == ""
    assert files.ROOT.is_dir()
