"""The form of the notebooks: ``python -m tools.notebooks list | check | restore | run | time | renumber | new``.

The notebooks are committed with the outputs of a clean run, so that they read well without being run.  What a run
leaves behind differs from one machine to the next (ids, timestamps, progress bars, metadata), so a notebook has one
*canonical* form: the same content always gives the same file, and a diff shows what changed and nothing else.

A notebook is known by its topic; the number in its file's name is its place in the order and nothing else.  Titles,
navigation, maps and links get their numbers from the files' names: ``[notebook 04](04_fp8_scaling.ipynb)`` leads to
fp8_scaling and says so, whatever its number becomes.  So a notebook is put in the middle by naming its file, such as
``04b_topic.ipynb``, and ``renumber``; ``new 04b_topic "Title"`` writes such a file, from ``new_notebook.md``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import io
import itertools
import os
import re
import sys
import time
from collections import namedtuple
from pathlib import Path

from qtutor import QtutorError, files, lesson

from . import command, runs, topic

NOTEBOOKS = files.ROOT / "notebooks"
CONTENTS = "00_start_here"
SETUP = "import qtutor\nqtutor.setup()"
TAGS = {"nav", "setup", "parameters", "exercise", "solution", "recipe"}
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}  # fmt: skip
MAX_LINES, MAX_RECIPE_LINES, MAX_PNG, MAX_FILE = 40, 30, 200_000, 1_500_000

_QUIZ = re.compile(r'qtutor\.lesson\.quiz\("(\w+)"\)')
_PATH = re.compile(r"(?<![\w:/.<~-])/(?:root|home|tmp|work|Users)\b|[A-Z]:\\Users")
_SOURCE_PATH = re.compile(r"(?<![\w:/.<~-])/(?:root|home|work|Users)/")  # /tmp is nobody's: a cell may use it
_ADDRESS = re.compile(r" ?\bat 0x[0-9a-fA-F]{6,}")
_STYLER = re.compile(r"T_[0-9a-f]{5}(?=[_\" {#,])")  # the random name that pandas gives a styled table
_PROGRESS = re.compile(r"\d+%\||\?it/s\]|\d(?:it/s|s/it)\b")  # tqdm, also where it draws without a widget
_WARNING = re.compile(r"\b[A-Z]\w*Warning: |\bWARNING\b")
_MEASURED = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)?\s?"
                       r"(?:ms\b|tok(?:ens)?/s|TFLOP|GiB used|J/token|x faster|× faster|times faster)")  # fmt: skip
_EFFORT = re.compile(r"\(\d+ minutes, (?:easy|medium|hard)\)")
_RECAP = r"^#+ .*\bRecap\b|^\*\*Recap"
_WIDGET = "application/vnd.jupyter.widget-view+json"


def names(folder=None) -> list[str]:
    """Names of the notebooks, in order: ``["00_start_here", ...]``."""
    return [path.stem for path in sorted(Path(folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))]


def find(name: str, folder=None) -> Path:
    """The notebook with this topic, number or file name; raises QtutorError where there is none."""
    folder = Path(folder or NOTEBOOKS)
    stem = Path(name).name.removesuffix(".ipynb")
    for one in names(folder):
        if stem in (one, topic(one), one[:2]) or stem.zfill(2) == one[:2]:
            return folder / f"{one}.ipynb"
    known = ", ".join(f"{one[:2]} ({topic(one)})" for one in names(folder)) or "none"
    raise QtutorError(f"There is no notebook {name!r}: choose from {known}.")


_LINK = re.compile(r"\[([^\[\]]*)\]\(((?:[\w.]+/)*)\d\d_(\w+)\.ipynb")
_NUMBERED = re.compile(r"((?:← )?(?:[Nn]otebook )?)\d\d(?=$| ·)")  # how the words of a link may begin
_MENTION = re.compile(r"(?<!\[)\b[Nn]otebooks?\s\d\d\b")  # outside a link, where no tool can know the topic
_ROW = re.compile(r"^\| \d\d \| \[[^\]]*\]\(((?:[\w.]+/)*)\d\d_(\w+)\.ipynb\) \| (.*) \|$", re.M)
_TIME = re.compile(r"(\*\*Time\*\*:? [^;]*; )(.+?)(?=\.(?:\s|$))", re.S)


def in_step(text: str, order: list[str]) -> str:
    """``text`` with the number of each ``NN_topic``, and of each link to a notebook, as it is in ``order``."""
    number = {topic(name): name[:2] for name in order}

    def words(match):
        shown = match[1]
        if match[3] in number:
            shown = _NUMBERED.sub(lambda m: m[1] + number[match[3]], shown, count=1)
        return match[0].replace(f"[{match[1]}]", f"[{shown}]", 1)

    def stem(match):
        return f"{number[match[1]]}_{match[1]}" if match[1] in number else match[0]

    return re.sub(r"(?<!\w)\d\d_(\w+)", stem, _LINK.sub(words, text))


def with_map(text: str, folder=None, without: str = "") -> str:
    """``text`` with the rows ``| 04 | [title](04_topic.ipynb) | what it is about |`` of its map as the files are.

    What a row says stays; a new notebook gets one that says nothing.  ``without``: the one that the map stands in.
    """
    if not (rows := list(_ROW.finditer(text))):
        return text
    folder, about = Path(folder or NOTEBOOKS), {row[2]: row[3] for row in rows}
    lines = [f"| {name[:2]} | [{title(folder / f'{name}.ipynb')}]({rows[0][1]}{name}.ipynb) | "
             f"{about.get(topic(name), '')} |" for name in names(folder) if name != without]  # fmt: skip
    return text[: rows[0].start()] + "\n".join(lines) + text[rows[-1].end() :]


def pages(root) -> dict[Path, str]:
    """The Markdown files that link to notebooks, and their text with links and map as the files are."""
    root = Path(root)
    there = [path for path in (root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/*.md")),
                              *sorted(root.glob("data/*/README.md")))
             if path.is_file()]  # fmt: skip
    order = names(root / "notebooks")
    return {path: with_map(in_step(path.read_text("utf-8"), order), root / "notebooks") for path in there}


def renumber(folder=None) -> dict[str, str]:
    """Number the files 00, 01, ... in order, bring titles, links, maps and pages in step; return {old: new name}."""
    folder = Path(folder or NOTEBOOKS)
    found = sorted(path.stem for path in folder.glob("[0-9][0-9]*_*.ipynb"))
    topics = [topic(name) for name in found]
    if twice := {one for one in topics if topics.count(one) > 1}:
        raise QtutorError(f"Two notebooks are about {sorted(twice)[0]}: give one of the files another topic.")
    renamed = {old: f"{i:02d}_{one}" for i, (old, one) in enumerate(zip(found, topics, strict=True))}
    renamed = {old: new for old, new in renamed.items() if old != new}
    for old, new in renamed.items():
        (folder / f"{old}.ipynb").rename(folder / f"{new}.ipynb")
    for _ in range(2):  # titles first: navigation and maps show them
        for name in names(folder):
            restore(folder / f"{name}.ipynb")
    for page, text in pages(folder.parent).items():
        files.write_text(page, text)
    return renamed


def _read(path):
    import nbformat

    path = Path(path)
    try:
        nb = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own and json's errors
        shown = " ".join(str(error).split())[:120]
        raise QtutorError(f"'{path.name}' cannot be read ({shown}): 'git checkout notebooks' restores it.") from None
    nb.nbformat_minor = 5
    return nb


def title(path) -> str:
    """The notebook's title without its number, from the heading ``# NN · Title``; "" where there is none."""
    cells = files.read_json(path, "notebook").get("cells", [])
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    match = re.search(r"^# \d\d · (.+)$", text, re.M)
    return match[1].strip() if match else ""


def tags(cell) -> list:
    """The tags of a cell, an empty list where it has none."""
    return cell.get("metadata", {}).get("tags", [])


def navigation(path) -> str:
    """Markdown links to the previous notebook, the contents and the next one, from the files that are there."""
    path = Path(path)
    order = names(path.parent)
    at = order.index(path.stem) if path.stem in order else -1

    def link(name, form):
        return f"[{form.format(name[:2] + ' · ' + (title(path.with_name(name + '.ipynb')) or name))}]({name}.ipynb)"

    links = [link(order[at - 1], "← {}")] if at > 0 else []
    if path.stem != CONTENTS:
        links.append(f"[Contents]({CONTENTS}.ipynb)" if CONTENTS in order else "[Contents](../README.md)")
    if 0 <= at < len(order) - 1:
        links.append(link(order[at + 1], "{} →"))
    return " · ".join(links)


def _opaque(png: str) -> str:
    """A PNG (base64) without the alpha channel that none of its pixels uses: the same picture, a seventh smaller.

    One that has no such channel is returned as it is, so that the form does not depend on a version of zlib.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(png)))
    except UnidentifiedImageError:
        return png
    if picture.mode != "RGBA" or picture.getchannel("A").getextrema() != (255, 255):
        return png
    picture.convert("RGB").save(smaller := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def _clean_outputs(outputs, count, order, styled) -> list:
    """Outputs without stderr, widgets, metadata and what differs in every run; neighbouring pieces of stdout joined."""
    import nbformat

    def lasting(value):
        if not isinstance(value, str):
            return value
        old_names = dict.fromkeys(_STYLER.findall(value))
        new_names = {old: f"T_{next(styled):05x}" for old in old_names}
        return in_step(_STYLER.sub(lambda m: new_names[m[0]], _ADDRESS.sub("", value)), order)

    cleaned = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if cleaned and cleaned[-1].output_type == "stream":
                cleaned[-1].text += output.text
                continue
        elif output.output_type in ("display_data", "execute_result"):
            if _WIDGET in output.data:  # a viewer without the widget's state could only say "model not found"
                continue
            if _PROGRESS.search(output.data.get("text/plain", "")):
                continue
            output.data = nbformat.from_dict({kind: _opaque(value) if kind == "image/png" else lasting(value)
                                              for kind, value in output.data.items()})  # fmt: skip
            alt = output.metadata.get("image/png", {}).get("alt")  # qtutor.alt_text
            output.metadata = nbformat.from_dict({"image/png": {"alt": lasting(alt)}} if alt else {})
            if output.output_type == "execute_result":
                output.execution_count = count
        output.pop("transient", None)
        cleaned.append(output)
    for output in cleaned:
        if output.output_type == "stream":  # of a line with carriage returns, what a terminal shows in the end
            lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n"))
            output.text = lasting("\n".join(lines))
    return [output for output in cleaned if output.output_type != "stream" or output.text.strip()]


def _markdown(source: str, path: Path, order: list[str]) -> str:
    """A Markdown cell with numbers, links, map and time to run as they are now."""
    source = re.sub(r"^# \d\d ·", f"# {path.stem[:2]} ·", source, count=1, flags=re.M)
    source = with_map(in_step(source, order), path.parent, path.stem)
    took = runs.time_to_run(topic(path))
    return _TIME.sub(lambda match: match[1] + took, source, count=1) if took else source


def canonical(nb, path):
    """Return a copy of the notebook in canonical form; ``path`` tells which notebook it is."""
    import nbformat

    nb, path = copy.deepcopy(nb), Path(path)
    order = names(path.parent)
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    cells = [cell for cell in nb.cells if cell.source.strip() or "nav" in tags(cell)]
    for end in (0, -1):
        if not (cells and "nav" in tags(cells[end])) or (end == -1 and len(cells) == 1):
            cells.insert(0 if end == 0 else len(cells), nbformat.v4.new_markdown_cell(metadata={"tags": ["nav"]}))
    nb.cells = cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    executed = all(cell.execution_count for cell in code)  # a notebook that was not run must not look as if it were
    counts = [cell.execution_count for cell in code if cell.execution_count]
    in_order = counts == sorted(set(counts))  # new numbers must not hide that cells were run in another order
    links, count, styled = navigation(path), 0, itertools.count()  # a style of one table must not reach another
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"
        found = tags(cell)
        cell.metadata = nbformat.from_dict({"tags": sorted(found)} if found else {})
        cell.pop("attachments", None)
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = (count if in_order else cell.execution_count) if executed else None
            lines = "\n".join(line.rstrip() for line in cell.source.split("\n")).rstrip()
            cell.source = in_step(lines, order)
            if "setup" in found and cell.source.split() == SETUP.split():
                cell.source = SETUP  # the same everywhere, blank lines included
            cell.outputs = _clean_outputs(cell.outputs, cell.execution_count, order, styled) if executed else []
            if executed and (match := _QUIZ.fullmatch(cell.source)):  # as its file is, without a run
                cell.outputs = [nbformat.v4.new_output("display_data", lesson.quiz_forms(match[1]))]
        else:
            cell.source = links if "nav" in found else _markdown(cell.source, path, order)
    return nb


def dumps(nb) -> str:
    """The notebook as text: keys sorted, one line of source a line, a newline at the end."""
    import nbformat

    return nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def restore(path) -> bool:
    """Bring one notebook into canonical form, in place; return whether the file changed."""
    text = dumps(canonical(_read(path), path))
    changed = text != Path(path).read_text("utf-8")
    if changed:
        files.write_text(path, text)
    return changed


def execute(path, timeout: float = 600) -> float:
    """Run a notebook from top to bottom with this interpreter, keep its outputs in canonical form; return seconds.

    ``timeout`` is in seconds a cell.  Where a cell fails, the file stays as it was.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = Path(path)
    nb = _read(path)
    manager = AsyncKernelManager(kernel_name="python3")
    # this interpreter and this package, whatever kernel specifications and packages the reader has of those names
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"]
    paths = os.pathsep.join(filter(None, [str(files.ROOT), os.environ.get("PYTHONPATH")]))
    manager._kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python",
                                      env={"PYTHONPATH": paths, "QTUTOR_PROGRESS": ""})  # fmt: skip
    client = NotebookClient(nb, manager, timeout=int(timeout), resources={"metadata": {"path": str(path.parent)}},
                            store_widget_state=False, record_timing=False)  # fmt: skip
    client.owns_km = True  # it ends the kernel of a manager that it was given, too
    start, at = time.perf_counter(), {}
    client.on_cell_start = lambda cell, cell_index: at.update(cell=cell_index)
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        said = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
        raise QtutorError(f"{path.stem}, cell {at.get('cell')}: {said.splitlines()[0]}: open the notebook and correct "
                          "that cell.") from None  # fmt: skip
    seconds = time.perf_counter() - start
    files.write_text(path, dumps(canonical(nb, path)))
    return seconds


def _opening(nb, path):
    """What is wrong with title, opening, setup cell, tags, lengths and closing."""
    cells = nb.cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    if not re.search(rf"^# {path.stem[:2]} · \S", text, re.M):
        yield f"no title '# {path.stem[:2]} · ...'"
    setups = [i for i, cell in enumerate(cells) if "setup" in tags(cell)]
    code = [i for i, cell in enumerate(cells) if cell.cell_type == "code"]
    if len(setups) != 1 or setups != code[:1] or cells[setups[0]].source != SETUP:
        yield f"the first code cell, and no other, must be tagged 'setup', with exactly {SETUP!r}"
    opening = "\n".join(cell.source for cell in cells[: setups[0] if setups else 3])
    for part in ("You will be able to", "You need"):
        if f"**{part}" not in opening:
            yield f"the opening lacks **{part}**"
    if not _TIME.search(opening):
        yield "the opening lacks **Time** about 60 minutes to read and do; about a minute to run."
    for i, cell in enumerate(cells):
        if unknown := set(tags(cell)) - TAGS:
            yield f"cell {i}: unknown tags {sorted(unknown)}"
        if cell.cell_type == "code" and (lines := cell.source.count("\n") + 1) > MAX_LINES:
            yield f"cell {i}: {lines} lines; {MAX_LINES} fit a screen"
        if match := _SOURCE_PATH.search(cell.source):
            yield f"cell {i}: an absolute path that begins with '{match[0]}'"
        if match := _MENTION.search(cell.source):
            yield f"cell {i}: '{match[0]}' without a link: numbers change, link it, or name its topic"
    for part in ("Recap", "Where to go next"):
        if not re.search(rf"^#+ .*\b{part}\b|^\*\*{part}", text, re.M):
            yield f"no {part!r} heading"
    pictures = any("image/png" in output.get("data", {}) for i in code for output in cells[i].outputs)
    if pictures and "**What you should see" not in text:
        yield "there are pictures, but no '**What you should see.**'"


#: An exercise in a notebook: number and source of its cell, the name it checks ("" where it checks nothing), the
#: expression that the check gets (usually "answer"), the fenced Python blocks of the folded solution that follows.
Asked = namedtuple("Asked", "cell source name answer solution")


def exercises(path) -> list[Asked]:
    """The exercises of a notebook, in order: what each cell tagged "exercise" checks."""
    cells, found = _read(path).cells, []
    for number, cell in enumerate(cells):
        if "exercise" not in tags(cell):
            continue
        calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
        calls = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "check" and len(call.args) == 2]
        after = cells[number + 1].source if number + 1 < len(cells) else ""
        folded = re.search(r"<details>(.*)</details>", after, re.S)
        solution = "\n\n".join(re.findall(r"```python\n(.*?)```", folded[1], re.S)) if folded else ""
        checks = [(ast.literal_eval(call.args[0]), ast.unparse(call.args[1])) for call in calls] or [("", "")]
        found += [Asked(number, cell.source, name, answer, solution) for name, answer in checks]
    return found


def _exercises(nb, path):
    cells, asked = nb.cells, exercises(path)
    if not 2 <= len({one.cell for one in asked}) <= 4:
        yield f"{len({one.cell for one in asked})} exercises; two to four are wanted"
    for one in asked:
        i, before = one.cell, cells[one.cell - 1]
        if not one.name.startswith(f"{topic(path)}."):
            yield f'cell {i}: the exercise needs a qtutor.lesson.check("{topic(path)}.name", answer)'
        elif cells[i].execution_count and "not attempted yet" not in str(cells[i].outputs):
            yield f"cell {i}: the exercise is answered already: leave 'answer = ...'"
        if before.cell_type != "markdown" or not _EFFORT.search(before.source):
            yield f"cell {i}: the task must stand in the cell before, with '(5 minutes, easy)', medium or hard"
        after = cells[i + 1].source if i + 1 < len(cells) else ""
        if re.findall(r"<summary>(\w+(?: \d)?)</summary>", after) != ["Hint 1", "Hint 2", "Solution"]:
            yield f"cell {i}: 'Hint 1', 'Hint 2' and 'Solution', each in <details>, must follow the exercise"
        if not one.solution:
            yield f"cell {i}: no folded solution (markdown with <details> and ```python) follows the exercise"


def _recall(nb, path):
    quizzes = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and _QUIZ.search(cell.source)]
    around = "\n".join(cell.source for at in quizzes for cell in nb.cells[at - 1 : at + 2])
    call = f'qtutor.lesson.quiz("{topic(path)}")'
    if len(quizzes) != 1 or not re.search(rf"^## Recall\b.*^{re.escape(call)}\n({_RECAP})", around, re.M | re.S):
        yield f"one cell {call} must stand between a cell '## Recall' and the recap"


def _recipes(nb, path):
    recipes = [i for i, cell in enumerate(nb.cells) if "recipe" in tags(cell)]
    if not 1 <= len(recipes) <= 4:
        yield f"{len(recipes)} cells tagged 'recipe'; one to four are wanted"
    for i in recipes:
        source = nb.cells[i].source
        if "qtutor" in source:
            yield f"cell {i}: a recipe stands alone, without qtutor"
        if (lines := source.count("\n") + 1) > MAX_RECIPE_LINES:
            yield f"cell {i}: a recipe of {lines} lines; {MAX_RECIPE_LINES} at most"
        if not re.search(r"^\W*Recipe\b", nb.cells[i - 1].source, re.M):
            yield f"cell {i}: the cell before a recipe must say what it is for: 'Recipe: ...'"


def _prose(nb, path):
    for i, cell in enumerate(nb.cells):
        text = re.sub(r"```.*?```", "", cell.source, flags=re.S) if cell.cell_type == "markdown" else ""
        for paragraph in re.split(r"\n\s*\n(?!\s*\|)", text):  # a table belongs to the sentence above it
            if not re.search(r"https?://", paragraph):  # a published figure carries its source
                for match in _MEASURED.finditer(paragraph):
                    yield f"cell {i}: '{match[0]}' looks measured: print it from data, or link its source"
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", paragraph):
                if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                    yield f"cell {i}: a link to {target!r}, which does not exist"


def _outputs(nb, path):
    code = [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    if not any(cell.execution_count for _, cell in code):
        yield f"it was not executed: python -m tools.notebooks run {topic(path)}"
        return
    for count, (i, cell) in enumerate(code, 1):
        if cell.execution_count != count:
            yield f"cell {i}: execution count {cell.execution_count}, not {count}"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {i}: ended in {output.ename}"
            elif output.get("name") == "stderr":
                yield f"cell {i}: output on stderr"
            data = {"text/": output.get("text", ""), **output.get("data", {})}
            for text in (value for kind, value in data.items() if kind.startswith("text/") or kind == "image/svg+xml"):
                for pattern, what in ((_PATH, "an absolute path"), (_ADDRESS, "an object's address"),
                                      (_WARNING, "a warning")):  # fmt: skip
                    if match := pattern.search(text):
                        shown = text[max(0, match.start() - 20) : match.end() + 30].replace("\n", " ")
                        yield f"cell {i}: {what} in the output: '{shown}'"
            if (size := len(base64.b64decode(data.get("image/png", "")))) > MAX_PNG:
                yield f"cell {i}: a PNG of {size // 1000} kB; {MAX_PNG // 1000} at most"


def check(path) -> list[str]:
    """Say what is wrong with the form of a notebook: one line each, an empty list when nothing is."""
    import nbformat

    path = Path(path)
    nb, text = _read(path), path.read_text("utf-8")
    found = [line for part in (_opening, _exercises, _recall, _recipes, _prose, _outputs) for line in part(nb, path)]
    if len(text.encode()) > MAX_FILE:
        found.append(f"the file has {len(text.encode()) / 1e6:.1f} MB; {MAX_FILE / 1e6} at most")
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        found.append(f"not valid: {str(error).splitlines()[0]}")
    if dumps(canonical(nb, path)) != text:
        found.append("not in canonical form: python -m tools.notebooks restore")
    return found


def new(name: str, heading: str) -> Path:
    """Write a notebook, its exercises and its quiz from ``new_notebook.md``; number, run and return it.

    ``name`` is its file's, such as ``04b_topic``: the number is where it stands.  Raises QtutorError for another name,
    a topic that there is already, and a title without words.
    """
    import nbformat

    if not re.fullmatch(r"\d\d[a-z]?_[a-z][a-z0-9_]*", name) or not heading.strip():
        raise QtutorError("Give a name such as 04b_my_topic (a number, an underscore, small letters) and a title.")
    if topic(name) in map(topic, names()):
        raise QtutorError(f"There is a notebook about {topic(name)} already: choose another topic.")
    text = Path(__file__).with_name("new_notebook.md").read_text("utf-8")
    text = text.replace("TOPIC", topic(name)).replace("TITLE", heading.strip())
    cells = []
    for block in text.split("\n%% ")[1:]:  # "%% code exercise", "%% markdown" or "%% file data/quiz/TOPIC.json"
        (kind, *rest), source = block.partition("\n")[0].split(), block.partition("\n")[2].strip("\n")
        if kind == "file":
            files.write_text(files.ROOT / rest[0], source + "\n")
        else:
            make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
            cells.append(make(source, metadata={"tags": rest} if rest else {}))
    path = NOTEBOOKS / f"{name}.ipynb"
    nb = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    files.write_text(path, dumps(nb))
    path = NOTEBOOKS / f"{renumber().get(name, name)}.ipynb"
    execute(path)
    return path


def main(argv: list[str]) -> int:
    """``list | check | restore | run | time | renumber | new``; return 1 where ``check`` or ``time`` finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "check", "restore", "run", "time", "renumber", "new"))
    parser.add_argument("notebook", nargs="*", help="topics, numbers or files, by default all; new: a name and a title")
    parser.add_argument("--jobs", type=int, default=1, help="with time: so many side by side")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a notebook (time) or a cell (run)")
    options = parser.parse_args(argv)
    if options.action == "new":
        if len(options.notebook) != 2:
            raise QtutorError("new needs a name and a title: new 04b_my_topic \"My title\".")
        print(f"written, and run: notebooks/{new(*options.notebook).name}")
        return 0
    chosen = options.notebook or names()
    paths = [Path(name) if Path(name).suffix and Path(name).is_file() else find(name) for name in chosen]
    if options.action == "renumber":
        print("\n".join(f"{old} -> {new}" for old, new in renumber().items()) or "the numbers are in order")
        return 0
    if options.action == "time":
        written = runs.measure(paths, options.jobs, options.limit)
        print(f"written: {written}")
        asked = set(map(topic, paths))
        return int(any(row["notebook"] in asked and row.get("not_run") for row in files.read_json(written)["rows"]))
    status = 0
    for path in paths:
        print(f"{path.stem}: ", end="", flush=True)
        if options.action == "list":
            print(title(path))
        elif options.action == "check":
            found = check(path)
            status |= bool(found)
            print("\n  ".join(["", *found]) if found else "ok")
        elif options.action == "restore":
            print("restored" if restore(path) else "unchanged")
        else:
            print(f"{execute(path, options.limit):.1f} s", flush=True)
    return status


if __name__ == "__main__":
    command(main)
