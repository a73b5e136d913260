"""Editions of the course from one source: ``python -m tools.editions --student OUT | --instructor OUT | --slides OUT``.

- student: solutions and stored outputs out, exercises and hints in;
- instructor: solutions in, and what a teacher wants to know: minutes of each part, what people answer wrongly and what
  the check replies, questions to ask (docs/questions.json);
- slides: the headings, prose and pictures of each notebook by nbconvert's reveal, which need no network.

Minutes are the notebook's own, at its top: its exercises take what they say, and its parts share the rest by length.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
from collections import namedtuple
from pathlib import Path

from qtutor import QtutorError, files, lesson

from . import command, notebooks, topic

DOCS = files.ROOT / "docs"
_EXERCISE = re.compile(r"\((\d+) minutes?[,)]")
_FENCE = re.compile(r"^```.*?^```", re.S | re.M)
_FOLDED = re.compile(r"<details>\s*<summary>.*?</details>\s*", re.S)

#: A part of a notebook, from one heading of the second level to the next: cells from ``first`` to ``last``, included.
Part = namedtuple("Part", "heading first last minutes")


def _cells(name: str) -> list[dict]:
    cells = files.read_json(notebooks.find(name), "notebook")["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def minutes(name: str) -> int:
    """Minutes to read and do a notebook, from its opening; raises QtutorError where it has none."""
    for cell in _cells(name)[:3]:
        if match := re.search(r"\*\*Time\*\*:? \D*(\d+) minutes to read and do", cell["source"]):
            return int(match[1])
    raise QtutorError(f"The opening of {name} lacks '**Time** ... minutes to read and do': add it.")


def parts(name: str) -> list[Part]:
    """The parts of a notebook with their minutes, which add up to the notebook's; the opening is the first one."""
    cells, found = _cells(name), []
    for number, cell in enumerate(cells):
        prose = _FENCE.sub("", cell["source"]) if cell["cell_type"] == "markdown" else ""
        heading = re.search(r"^##? (.+)$", prose, re.M)
        if "nav" in notebooks.tags(cell):
            continue
        if heading or not found:
            found.append([heading[1] if heading else name, number, number, 0, 0])
        part = found[-1]
        part[2] = number
        weight = len(_FOLDED.sub("", cell["source"]).split())
        part[3] += 2 * weight if cell["cell_type"] == "markdown" else weight
        part[4] += sum(map(int, _EXERCISE.findall(prose)))
    words, free = sum(part[3] for part in found), minutes(name) - sum(part[4] for part in found)
    return [Part(*part[:3], part[4] + free * part[3] / words) for part in found]


def _whole(minutes_: float) -> int:
    return max(1, round(minutes_))


def chosen(programme: dict) -> list[tuple[str, list[Part]]]:
    """(notebook, its parts) of a programme: whole notebooks, or the parts whose headings begin with what it names."""
    found = []
    for about, wanted in programme["parts"]:
        name = notebooks.find(about).stem
        there = parts(name)
        if wanted:
            if missing := [w for w in wanted if not any(part.heading.startswith(w) for part in there)]:
                raise QtutorError(f"{name} has no part that begins with {missing[0]!r}: correct docs/programmes.json.")
            there = [part for part in there if any(part.heading.startswith(w) for w in wanted)]
        found.append((name, there))
    return found


def programmes() -> str:
    """The programmes of docs/programmes.json as Markdown: notebooks, parts, cells, minutes."""
    said = []
    for programme in files.read_json(DOCS / "programmes.json"):
        rows, total = [], 0
        for name, there in chosen(programme):
            for part in there:
                total += part.minutes
                rows.append(f"| [{name[:2]}](../notebooks/{name}.ipynb) | {part.heading.split('·')[-1].strip()} | "
                            f"{part.first}–{part.last} | {_whole(part.minutes)} |")  # fmt: skip
        rows.append(f"| | **together** | | **{_whole(total)}** |")
        said.append("\n".join([f"### {programme['title']}\n", programme["what"] + "\n",
                               "| notebook | part | cells | minutes |", "|---|---|--:|--:|", *rows]))  # fmt: skip
    return "\n\n".join(said)


def student(nb, path):
    """The notebook without solutions and without outputs; hints stay."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = _FOLDED.sub(lambda match: match[0] if ">Hint" in match[0] else "", cell.source).strip()
        else:
            cell.outputs, cell.execution_count = [], None
    nb.cells = [cell for cell in nb.cells if cell.source]
    return nb


def replies(name: str) -> list[str]:
    """What the check of an exercise replies to the wrong answers that its tests list, each once."""
    lesson.verdict(name, ...)  # loads the exercises; says so where there is none of this name
    said = [lesson.verdict(name, answer)[1] for answer in lesson.REGISTRY[name].wrong]
    return list(dict.fromkeys(said))


def instructor(nb, path):
    """The notebook with a plan at its top, and after each exercise what people answer wrongly."""
    from nbformat.v4 import new_markdown_cell

    plan = [f"| {part.heading} | {part.first}–{part.last} | {_whole(part.minutes)} |" for part in parts(path.stem)]
    ask = files.read_json(DOCS / "questions.json").get(topic(path), [])
    after = {}
    for one in notebooks.exercises(path):
        lines = ["- " + reply.replace("*", "\\*") for reply in replies(one.name)]
        after[one.cell] = new_markdown_cell("> **For the teacher**: wrong answers that were foreseen get these "
                                            "replies.\n\n" + "\n".join(lines))  # fmt: skip
    head = ["## For the teacher", "| part | cells | minutes |\n|---|--:|--:|\n" + "\n".join(plan),
            "**Questions to ask**", "\n".join(f"- {question}" for question in ask)]  # fmt: skip
    cells = []
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("<details>", "<details open>")
        cells += [cell, *([after[number]] if number in after else [])]
        if number == 1:
            cells.append(new_markdown_cell("\n\n".join(head)))
    nb.cells = cells
    return nb


def _on_a_slide(output) -> bool:
    """Whether an output is a figure or a table of a few rows."""
    data = output.get("data", {})
    return "image/png" in data or 1 < data.get("text/html", "").count("<tr") <= 9


def slides(nb, path):
    """The notebook as slides: a part, then its prose, figures and small tables below one another; code stays out."""
    from nbformat.v4 import new_markdown_cell

    cells, figure = [], False
    for cell in nb.cells:
        if cell.cell_type == "markdown" and "```" not in cell.source:  # a heading begins a slide
            sources = filter(str.strip, re.split(r"^(?=##? )", cell.source, flags=re.M))
            cells += [new_markdown_cell(source, metadata=dict(cell.metadata)) for source in sources]
        else:
            cells.append(cell)
    for cell in cells:
        shown = list(filter(_on_a_slide, cell.get("outputs", [])))
        apart = {"nav", "setup", "exercise", "recipe"} & set(notebooks.tags(cell)) or "<details>" in cell.source
        if apart or (cell.cell_type == "code" and not shown):
            kind = "skip"
        elif cell.cell_type == "markdown" and re.match("##? ", cell.source):
            kind = "slide"
        else:  # what to see stands below its figure
            kind = "-" if figure and cell.source.startswith("**What you should see") else "subslide"
        cell.metadata["slideshow"] = {"slide_type": kind}
        figure = bool(shown) or (figure and kind == "skip")
        if cell.cell_type == "code":
            cell.outputs = shown
    nb.cells = cells
    return nb


# nbconvert's own page asks unpkg.com and others for reveal.js, MathJax, jQuery, RequireJS and Mermaid
_DECK = """{% extends "reveal/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}<script>MathJax = {tex: {inlineMath: [["$", "$"]]}};</script>
<script async src="mathjax/tex-chtml.js"></script>{% endblock %}
{% block html_head_css %}<style>.reveal .slides section { font-size: 22px; max-height: 92vh; overflow-y: auto; }
.reveal h1 { font-size: 1.8em; } .reveal h2 { font-size: 1.4em; } .reveal h3 { font-size: 1.2em; }
.reveal img { max-height: 55vh; margin: 0; } .jp-Cell { text-align: left; }</style>{% endblock %}
{% block footer_js %}<script src="revealjs/dist/reveal.js"></script>
<script>Reveal.initialize({hash: true, slideNumber: true, width: 1200, height: 720});</script>{% endblock %}
"""


def _package_file(package: str, part: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise QtutorError(f"{package} is not installed here: pip install -c constraints.txt -e '.[test]'.")
    return Path(spec.origin).parent / part


def deck(path: Path, out: Path) -> Path:
    """Write one notebook as a page of slides into a folder, beside the scripts that it needs; return the page."""
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import SlidesExporter

    out = Path(out)
    for package, part, name in (("sphinx_revealjs", "_static/revealjs", "revealjs"),
                                ("sphinx-mathjax-offline", "static/mathjax", "mathjax")):  # fmt: skip
        shutil.copytree(_package_file(package, part), out / name, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.map", "*mml*", "*svg*", "*full*", "sre"))  # fmt: skip
    exporter = SlidesExporter(extra_loaders=[DictLoader({"deck.j2": _DECK})], template_file="deck.j2",
                              exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True,
                              reveal_url_prefix="revealjs", reveal_theme="white")  # fmt: skip
    nb = slides(nbformat.read(path, as_version=4), path)
    html, _ = exporter.from_notebook_node(nb, {"metadata": {"name": notebooks.title(path)}})
    return files.write_text(out / f"{path.stem}.html", html.replace(".ipynb", ".html"))


def write(edition, out: Path) -> list[Path]:
    """Write an edition (:func:`student`, :func:`instructor`) of all notebooks into a folder; return the files."""
    import nbformat

    out, written = Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    for name in notebooks.names():
        path = notebooks.find(name)
        nb = edition(nbformat.read(path, as_version=4), path)
        for number, cell in enumerate(nb.cells):
            cell.id = f"cell-{number:02d}"
        written.append(files.write_text(out / path.name, notebooks.dumps(nb)))
    return written


def main(argv: list[str]) -> int:
    """``--student OUT``, ``--instructor OUT``, ``--slides OUT``: any of them, each into a folder of its own."""
    parser = argparse.ArgumentParser(prog="python -m tools.editions", description=__doc__.splitlines()[0])
    for name in ("student", "instructor", "slides"):
        parser.add_argument(f"--{name}", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    for edition, out in ((student, options.student), (instructor, options.instructor)):
        if out:
            print(f"{len(write(edition, out))} notebooks: {out}")
    if options.slides:
        pages = [deck(notebooks.find(name), options.slides) for name in notebooks.names()]
        print(f"{len(pages)} pages of slides: {options.slides}")
    return 0


if __name__ == "__main__":
    command(main)
