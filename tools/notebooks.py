"""The form of the notebooks: ``python -m qtutor notebooks list | check | restore | run [01 05 ...]``.

The notebooks are committed with the outputs of a clean run, so that they read well without being run.  What a run
leaves behind differs from one machine to the next (ids, timestamps, progress bars, metadata), so a notebook has one
*canonical* form: the same content always gives the same file, and a diff shows what changed and nothing else.

``run`` executes notebooks and restores that form, ``restore`` only restores it, ``check`` says what is missing:
links to the neighbours, the opening, exercises with solutions, recipes, and outputs that are fit to be read.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qtutor import QtutorError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CONTENTS = "00_start_here"
SETUP = "import qtutor\nqtutor.setup()"
TAGS = {"nav", "setup", "parameters", "exercise", "solution", "recipe"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_LINES, MAX_RECIPE_LINES, MAX_PNG, MAX_FILE = 40, 30, 200_000, 1_500_000

_PATH = re.compile(r"(?<![\w:/.<~-])/(?:root|home|tmp|work|Users)\b|[A-Z]:\\Users")
_SOURCE_PATH = re.compile(r"(?<![\w:/.<~-])/(?:root|home|work|Users)/")  # /tmp is nobody's: a cell may use it
_ADDRESS = re.compile(r" ?\bat 0x[0-9a-fA-F]{6,}")
_STYLER = re.compile(r"T_[0-9a-f]{5}(?=[_\" {#,])")  # the random name that pandas gives a styled table
_PROGRESS = re.compile(r"\d+%\||\?it/s\]|\d(?:it/s|s/it)\b")  # tqdm, also where it draws without a widget
_WARNING = re.compile(r"\b[A-Z]\w*Warning: |\bWARNING\b")
_MEASURED = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)?\s?"
                       r"(?:ms\b|tok(?:ens)?/s|TFLOP|GiB used|J/token|x faster|× faster|times faster)")  # fmt: skip
_WIDGET = "application/vnd.jupyter.widget-view+json"


def names(folder=None) -> list[str]:
    """Names of the notebooks, in order: ``["00_start_here", "01_number_formats", ...]``."""
    return [path.stem for path in sorted(Path(folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))]


def _read(path):
    import nbformat

    path = Path(path)
    try:
        nb = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise QtutorError(f"There is no notebook '{path.name}': run 'python -m qtutor notebooks list'.") from None
    except Exception as error:  # nbformat raises its own and json's errors
        shown = " ".join(str(error).split())[:120]
        raise QtutorError(f"'{path.name}' is no notebook ({shown}): restore it with "
                          "'git checkout notebooks'.") from None  # fmt: skip
    nb.nbformat_minor = 5
    return nb


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was; raises QtutorError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise QtutorError(f"'{path.name}' cannot be written ({error.strerror}): make its folder writable.") from None


def title(path) -> str:
    """The notebook's title without its number, from the heading ``# NN · Title``; "" where there is none."""
    found = [re.search(r"^# \d\d · (.+)$", cell.source, re.M) for cell in _read(path).cells
             if cell.cell_type == "markdown"]  # fmt: skip
    return next((match[1].strip() for match in found if match), "")


def tags(cell) -> list:
    """The tags of a cell, an empty list where it has none."""
    return cell.get("metadata", {}).get("tags", [])


@dataclass(frozen=True)
class Asked:
    """An exercise as it stands in a notebook: its cell, the name and the answer it checks, its folded solution."""

    name: str
    cell: int
    source: str
    answer: str  # the expression that the check gets, usually "answer"
    solution: str  # the fenced Python blocks of the cell that follows


def _checks(source: str) -> list[tuple[str, str]]:
    """Name and answer of each ``check("NN.name", answer)`` in a cell."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [(call.args[0].value, ast.unparse(call.args[1])) for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "check"
            and len(call.args) == 2 and isinstance(call.args[0], ast.Constant)]  # fmt: skip


def exercises(path) -> list[Asked]:
    """The exercises of a notebook, in order: what each cell tagged "exercise" checks."""
    cells, found = _read(path).cells, []
    for number, cell in enumerate(cells):
        if "exercise" in tags(cell):
            after = cells[number + 1].source if number + 1 < len(cells) else ""
            solution = "\n\n".join(re.findall(r"```python\n(.*?)```", after, re.S)) if "<details>" in after else ""
            found += [Asked(name, number, cell.source, answer, solution) for name, answer in _checks(cell.source)]
    return found


# --------------------------------------------------------------------------------------------------- canonical form


def navigation(path) -> str:
    """Markdown links to the previous notebook, the contents and the next one, from the files that are there."""
    path = Path(path)
    order = names(path.parent)
    at = order.index(path.stem) if path.stem in order else -1

    def link(index, form):
        name = order[index]
        return f"[{form.format(name[:2] + ' · ' + (title(path.with_name(name + '.ipynb')) or name))}]({name}.ipynb)"

    links = []
    if at > 0:
        links.append(link(at - 1, "← {}"))
    if path.stem != CONTENTS:
        links.append(f"[Contents]({CONTENTS}.ipynb)" if CONTENTS in order else "[Contents](../README.md)")
    if 0 <= at < len(order) - 1:
        links.append(link(at + 1, "{} →"))
    return " · ".join(links)


def _final_line(line: str) -> str:
    """What a terminal shows in the end of a line with carriage returns."""
    return line.rstrip("\r").rsplit("\r", 1)[-1]


def _lasting(value):
    """Text without what is different in every run: addresses of objects, random names of styled tables."""
    if not isinstance(value, str):
        return value
    new_names = {}
    return _STYLER.sub(lambda m: new_names.setdefault(m[0], f"T_{len(new_names):05x}"), _ADDRESS.sub("", value))


def _clean_outputs(outputs, count) -> list:
    """Outputs without stderr, widgets and metadata; neighbouring pieces of stdout joined."""
    import nbformat

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
            output.data = nbformat.from_dict({kind: _lasting(value) for kind, value in output.data.items()})
            output.metadata = nbformat.NotebookNode()
            if output.output_type == "execute_result":
                output.execution_count = count
        output.pop("transient", None)
        cleaned.append(output)
    for output in cleaned:
        if output.output_type == "stream":
            output.text = _lasting("\n".join(map(_final_line, output.text.split("\n"))))
    return [output for output in cleaned if output.output_type != "stream" or output.text.strip()]


def canonical(nb, path):
    """Return a copy of the notebook in canonical form; ``path`` tells which notebook it is."""
    import nbformat

    nb = copy.deepcopy(nb)
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
    links, count = navigation(path), 0
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"
        found = tags(cell)
        cell.metadata = nbformat.from_dict({"tags": sorted(found)} if found else {})
        cell.pop("attachments", None)
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = (count if in_order else cell.execution_count) if executed else None
            cell.source = "\n".join(line.rstrip() for line in cell.source.split("\n")).rstrip()
            if "setup" in found and cell.source.split() == SETUP.split():
                cell.source = SETUP  # the same everywhere, blank lines included
            cell.outputs = _clean_outputs(cell.outputs, cell.execution_count) if executed else []
        elif "nav" in found:
            cell.source = links
    return nb


def dumps(nb) -> str:
    """The notebook as text: keys sorted, one line of source a line, a newline at the end."""
    import nbformat

    return nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def restore(path) -> bool:
    """Bring one notebook into canonical form, in place; return whether the file changed."""
    path = Path(path)
    text = dumps(canonical(_read(path), path))
    if text == path.read_text("utf-8"):
        return False
    write_whole(path, text)
    return True


# ---------------------------------------------------------------------------------------------------------- running


def execute(path, timeout: int | None = None, kernel_name: str = "python3") -> float:
    """Run a notebook from top to bottom with this interpreter, keep its outputs in canonical form; return seconds.

    ``timeout`` is in seconds a cell: 600, or an hour where a cell records results (``make results``), which may train
    a dozen models.  Raises QtutorError where a cell fails; the file then stays as it was.
    """
    if timeout is None:
        timeout = 3600 if os.environ.get("QTUTOR_SAVE_RESULTS") == "1" else 600
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = Path(path)
    nb = _read(path)
    manager = AsyncKernelManager(kernel_name=kernel_name)
    # this interpreter, whatever kernel specifications the reader has of that name
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=40"]
    manager._kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python")
    client = NotebookClient(nb, manager, timeout=timeout, resources={"metadata": {"path": str(path.parent)}},
                            store_widget_state=False, record_timing=False)  # fmt: skip
    start, at = time.perf_counter(), {}
    client.on_cell_start = lambda cell, cell_index: at.update(cell=cell_index)
    try:
        client.execute()
    except CellExecutionError as error:
        raise QtutorError(f"{path.stem}, cell {at.get('cell')}: {error.ename}: {' '.join(error.evalue.split())}: "
                          "open the notebook and correct that cell.") from None  # fmt: skip
    except (CellTimeoutError, DeadKernelError) as error:
        raise QtutorError(f"{path.stem}, cell {at.get('cell')}: {str(error).splitlines()[0]}: open the notebook and "
                          "make that cell shorter.") from None  # fmt: skip
    seconds = time.perf_counter() - start
    write_whole(path, dumps(canonical(nb, path)))
    return seconds


# --------------------------------------------------------------------------------------------------------- checking


def _prose(cells):
    """Paragraphs of the markdown cells without fenced code: (cell number, paragraph)."""
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```", "", cell.source, flags=re.S)
            for paragraph in re.split(r"\n\s*\n(?!\s*\|)", text):  # a table belongs to the sentence above it
                yield number, paragraph


def _check_structure(nb, path) -> list[str]:
    found, cells = [], nb.cells
    if not cells:
        return ["it has no cells"]
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    number = path.stem[:2]
    if not re.search(rf"^# {number} · \S", text, re.M):
        found.append(f"no title '# {number} · ...'")
    setups = [i for i, cell in enumerate(cells) if "setup" in tags(cell)]
    code = [i for i, cell in enumerate(cells) if cell.cell_type == "code"]
    if len(setups) != 1 or setups != code[:1] or cells[setups[0]].source != SETUP:
        found.append(f"the first code cell, and no other, must be tagged 'setup', with exactly {SETUP!r}")
    opening = "\n".join(cell.source for cell in cells[: setups[0] if setups else 3])
    for part in ("You will be able to", "You need", "Time"):
        if not re.search(rf"\*\*{part}", opening):
            found.append(f"the opening lacks **{part}**")
    for i, cell in enumerate(cells):
        if unknown := set(tags(cell)) - TAGS:
            found.append(f"cell {i}: unknown tags {sorted(unknown)}")
        if cell.cell_type == "code" and cell.source.count("\n") + 1 > MAX_LINES:
            found.append(f"cell {i}: {cell.source.count(chr(10)) + 1} lines; {MAX_LINES} fit a screen")
        if match := _SOURCE_PATH.search(cell.source):
            found.append(f"cell {i}: an absolute path that begins with '{match[0]}'")
    for part in ("Recap", "Where to go next"):
        if not re.search(rf"^#+ .*\b{part}\b|^\*\*{part}", text, re.M):
            found.append(f"no {part!r} heading")
    pictures = any("image/png" in output.get("data", {}) for i in code for output in cells[i].outputs)
    if pictures and "**What you should see" not in text:
        found.append("there are pictures, but no '**What you should see.**'")
    return found + _check_exercises(cells, number) + _check_recipes(cells) + _check_prose(cells, path)


def _check_exercises(cells, number) -> list[str]:
    exercises, found = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)], []
    if not 2 <= len(exercises) <= 4:
        found.append(f"{len(exercises)} exercises; two to four are wanted")
    for i in exercises:
        asked = _checks(cells[i].source)
        if not asked or not all(name.startswith(f"{number}.") for name, _ in asked):
            found.append(f"cell {i}: the exercise needs a qtutor.lesson.check(\"{number}.name\", answer)")
        elif cells[i].execution_count and "not attempted yet" not in str(cells[i].outputs):
            found.append(f"cell {i}: the exercise is answered already: leave 'answer = ...'")
        before = cells[i - 1]
        if before.cell_type != "markdown" or not re.search(r"\bmin", before.source):
            found.append(f"cell {i}: the task, with minutes and difficulty, must stand in the cell before")
        after = cells[i + 1] if i + 1 < len(cells) else None
        folded = after is not None and after.cell_type == "markdown" and "<details>" in after.source
        if not folded or "```python" not in after.source or "</details>" not in after.source:
            found.append(f"cell {i}: no folded solution (markdown with <details> and ```python) follows the exercise")
    return found


def _check_recipes(cells) -> list[str]:
    recipes, found = [i for i, cell in enumerate(cells) if "recipe" in tags(cell)], []
    if not 1 <= len(recipes) <= 4:
        found.append(f"{len(recipes)} cells tagged 'recipe'; one to four are wanted")
    for i in recipes:
        if "qtutor" in cells[i].source:
            found.append(f"cell {i}: a recipe stands alone, without qtutor")
        if (lines := cells[i].source.count("\n") + 1) > MAX_RECIPE_LINES:
            found.append(f"cell {i}: a recipe of {lines} lines; {MAX_RECIPE_LINES} at most")
        if not re.search(r"^\W*Recipe\b", cells[i - 1].source, re.M):
            found.append(f"cell {i}: the cell before a recipe must say what it is for: 'Recipe: ...'")
    return found


def measured_numbers(paragraph: str) -> list[str]:
    """What looks measured ("12 ms", "3 x faster") in a paragraph that links no source."""
    linked = re.search(r"\]\(https?:|https?://", paragraph)
    return [] if linked else [match[0] for match in _MEASURED.finditer(paragraph)]


def _check_prose(cells, path) -> list[str]:
    found = []
    for i, paragraph in _prose(cells):
        for number in measured_numbers(paragraph):
            found.append(f"cell {i}: '{number}' looks measured: print it from data, or link its source")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", paragraph):
            if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                found.append(f"cell {i}: a link to {target!r}, which does not exist")
    return found


def _texts(output):
    if output.output_type == "stream":
        yield output.text
    elif output.output_type != "error":
        for kind, value in output.data.items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield value


def _check_outputs(nb, path) -> list[str]:
    found, count = [], 0
    if not any(cell.get("execution_count") for cell in nb.cells):
        return ["it was not executed: python -m qtutor notebooks run " + path.stem[:2]]
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        count += 1
        if cell.execution_count != count:
            found.append(f"cell {i}: execution count {cell.execution_count}, not {count}")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {i}: ended in {output.ename}")
            elif output.get("name") == "stderr":
                found.append(f"cell {i}: output on stderr")
            for text in _texts(output):
                for pattern, what in ((_PATH, "an absolute path"), (_ADDRESS, "an object's address"),
                                      (_WARNING, "a warning")):  # fmt: skip
                    if match := pattern.search(text):
                        shown = text[max(0, match.start() - 20) : match.end() + 30].replace("\n", " ")
                        found.append(f"cell {i}: {what} in the output: '{shown}'")
            size = len(base64.b64decode(output.get("data", {}).get("image/png", "")))
            if size > MAX_PNG:
                found.append(f"cell {i}: a PNG of {size // 1000} kB; {MAX_PNG // 1000} at most")
    return found


def check(path) -> list[str]:
    """Say what is wrong with the form of a notebook: one line each, an empty list when nothing is."""
    import nbformat

    path = Path(path)
    nb, text = _read(path), path.read_text("utf-8")
    found = _check_structure(nb, path) + _check_outputs(nb, path)
    if len(text.encode()) > MAX_FILE:
        found.append(f"the file has {len(text.encode()) / 1e6:.1f} MB; {MAX_FILE / 1e6} at most")
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        found.append(f"not valid: {str(error).splitlines()[0]}")
    if dumps(canonical(nb, path)) != text:
        found.append("not in canonical form: python -m qtutor notebooks restore")
    return found


# ------------------------------------------------------------------------------------------------------ the command


def _paths(chosen) -> list[Path]:
    order, wanted = names(), []
    for name in chosen or order:
        stem = Path(name).name.removesuffix(".ipynb")
        match = [n for n in order if stem in (n, n[:2]) or stem.zfill(2) == n[:2]]
        if not match:
            known = ", ".join(n[:2] for n in order) or "none"
            raise QtutorError(f"There is no notebook {name!r}: choose from {known}.")
        wanted.append(NOTEBOOKS / f"{match[0]}.ipynb")
    return wanted


def main(argv: list[str]) -> int:
    """``notebooks list | check | restore | run [names]``; return 1 where ``check`` finds something."""
    parser = argparse.ArgumentParser(prog="qtutor notebooks", description="list, check, restore or run the notebooks")
    parser.add_argument("action", choices=("list", "check", "restore", "run"))
    parser.add_argument("notebook", nargs="*", help="numbers or names; all of them by default")
    options = parser.parse_args(argv)
    status = 0
    for path in _paths(options.notebook):
        if options.action == "list":
            print(f"{path.stem:<28} {title(path)}")
        elif options.action == "check":
            found = check(path)
            status |= bool(found)
            print(f"{path.stem}: " + ("ok" if not found else "".join(f"\n  {line}" for line in found)))
        elif options.action == "restore":
            print(f"{path.stem}: {'restored' if restore(path) else 'unchanged'}")
        else:
            print(f"{path.stem}: ", end="", flush=True)
            print(f"{execute(path):.1f} s", flush=True)
    return status
