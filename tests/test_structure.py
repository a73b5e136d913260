"""The shape of the package, read from its code: who may import whom, how large it may be, and that all of it is used.

This table is the rule; everything below only reads the code and compares.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder          may import                              at most so many lines (with everything in it)
MAY_IMPORT = {
    "core": {"core"},
    "emulation": {"core", "emulation"},
    "kernels": {"kernels"},
    "checkpoints": {"core", "checkpoints"},
    "decide": {"core", "decide"},
    "rigs": {"core", "checkpoints", "decide", "rigs"},
    "figures": {"core", "decide", "figures"},
    "exercises": {"core", "decide", "exercises"},
    "tools": {"core", "emulation", "checkpoints", "decide", "rigs", "figures", "exercises", "tools"},
}
# The core imports a folder in these places only, and only when a function is called.
LAZY = {("te_switch", "emulation"), ("lesson", "exercises"), ("ste", "kernels"), ("__main__", "decide"),
        ("__main__", "checkpoints")}  # fmt: skip
LINES = {"core": 5_871, "package": 14_986, "tools": 5_329}


def folder_of(module: str) -> str:
    """ "qtutor.decide.pareto" -> "decide", "qtutor.formats" -> "core", "tools.report" -> "tools"."""
    parts = module.split(".")
    if parts[0] == "tools":
        return "tools"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


def python_files(*folders) -> list[Path]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in paths if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in python_files("qtutor", "tools")}
TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in MODULES.items()}


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that an import statement names, from the root."""
    if not node.level:
        return node.module or ""
    inside = MODULES[module].name == "__init__.py"
    base = module.split(".")
    base = base[: len(base) - node.level + inside]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(module: str):
    """(imported module of ours, imported name or None, is it at the top of the file) for each import of a module."""
    top = set(map(id, TREES[module].body))
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module)
            for alias in node.names:
                if f"{source}.{alias.name}" in MODULES:
                    yield f"{source}.{alias.name}", None, id(node) in top
                elif source in MODULES:
                    yield source, alias.name, id(node) in top


def test_each_folder_imports_only_what_the_table_allows():
    wrong = []
    for module in MODULES:
        for other, _, at_top in imports(module):
            here, there = folder_of(module), folder_of(other)
            lazy = (module.split(".")[-1], there) in LAZY and not at_top
            if there not in MAY_IMPORT[here] and not lazy:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_lazy_imports_counted():
    graph = {module: {other for other, _, _ in imports(module) if other != "qtutor"} - {module} for module in MODULES}
    graph["qtutor"] = set()  # qtutor's own names are there before any module of it is loaded
    done, path = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in path, "a circle: " + " -> ".join([*path[path.index(module) :], module])
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_used(tree: ast.AST, bound: dict[str, str]):
    """(module, attribute) for each ``module.attribute`` of a tree, where ``bound`` tells which names are modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts.insert(0, value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in bound:
                full = bound[value.id].split(".") + parts
                for cut in range(len(full) - 1, 0, -1):
                    if ".".join(full[:cut]) in MODULES:
                        yield ".".join(full[:cut]), full[cut]
                        break


def bindings(tree: ast.AST, module: str | None = None) -> tuple[dict, set]:
    """Names that stand for our modules, and (module, name) pairs imported from them."""
    bound, taken = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                if first in ("qtutor", "tools"):
                    bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module) if module else (node.module or "")
            for alias in node.names:
                if f"{source}.{alias.name}" in MODULES:
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
                elif source in MODULES:
                    taken.add((source, alias.name))
    return bound, taken


def test_no_module_reaches_into_another():
    wrong = []
    for module, tree in TREES.items():
        bound, taken = bindings(tree, module)
        for other, name in [*names_used(tree, bound), *taken]:
            if private(name) and other != module:
                wrong.append(f"{module} uses {other}.{name}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def notebook_code() -> dict[str, ast.AST]:
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                code = "\n".join(line for line in lines if not re.match(r"[%!]+[a-z]", line))
                found[f"{path.stem}:{number}"] = code
    return found


def test_every_public_name_is_used_and_not_by_tests_alone():
    used = set()
    for module, tree in TREES.items():
        bound, taken = bindings(tree, module)
        used |= {pair for pair in [*names_used(tree, bound), *taken] if pair[0] != module}
        own = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        own += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        used |= {(module, name) for name in own}
        exported = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
        used |= {(module, name) for n in exported for name in re.findall(r"'(\w+)'", ast.unparse(n.value))}
    for path in [*(ROOT / "bench").glob("*.py"), ROOT / "docs" / "conf.py"]:
        tree = ast.parse(path.read_text("utf-8"))
        bound, taken = bindings(tree)
        used |= {*names_used(tree, bound), *taken}
    bound = defaultdict(dict)
    for where, code in notebook_code().items():  # a notebook's cells share their names
        tree = ast.parse(code)
        names, taken = bindings(tree)
        bound[where.split(":")[0]] |= names
        used |= {*names_used(tree, bound[where.split(":")[0]]), *taken}
    lazily = {"__getattr__", "__dir__", "main", "__version__", "__all__", "RECORDS"}
    unused = []
    for module, tree in TREES.items():
        if module.startswith("qtutor.exercises"):
            continue  # registered by their decorators
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not private(name) and name not in lazily and (module, name) not in used:
                    unused.append(f"{module}.{name}")
    assert not unused, "used by nothing or by tests alone: " + ", ".join(unused)


def test_sizes():
    lines = {module: len(path.read_text("utf-8").splitlines()) for module, path in MODULES.items()}
    core = sum(n for module, n in lines.items() if folder_of(module) == "core")
    package = sum(n for module, n in lines.items() if folder_of(module) != "tools")
    tools = sum(n for module, n in lines.items() if folder_of(module) == "tools")
    assert core <= LINES["core"], f"what lies directly in qtutor/ has {core:,} lines"
    assert package <= LINES["package"], f"the package has {package:,} lines"
    assert tools <= LINES["tools"], f"tools/ has {tools:,} lines"


def test_import_is_cheap():
    """Nothing but a few modules of Python's own: 0.1 s, said without a clock, which a busy machine would upset."""
    code = "import sys; before = set(sys.modules); import qtutor; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded - {"qtutor"} <= sys.stdlib_module_names and len(done.stdout.split()) < 60, done.stdout


# Where a module is tested that has no test_<module>.py of its own.
TESTED_ELSEWHERE = {
    "qtutor": "test_package.py",
    "qtutor.gguf_file": "test_llamacpp.py",  # one door to GGUF files, tested with what goes through it
    "qtutor.decide.techniques": "rigs/test_techniques.py",  # a table; what is built from it is tested
} | {module: "exercises/test_exercises.py" for module in MODULES if module.startswith("qtutor.exercises.")}


def test_tests_mirror_the_package():
    """qtutor/decide/pareto.py is tested in tests/decide/test_pareto.py; a folder has a folder of tests."""
    missing = []
    for module, path in MODULES.items():
        parts = module.removeprefix("qtutor.").split(".")
        own = "/".join([*parts[:-1], f"test_{parts[-1].strip('_')}.py"])
        own = parts[-1] if path.name == "__init__.py" else own
        expected = TESTED_ELSEWHERE.get(module, own)
        if not (ROOT / "tests" / expected).exists():
            missing.append(f"{module} in tests/{expected}")
    assert not missing, "not tested where one would look: " + ", ".join(missing)


def test_no_table_entry_is_left_over():
    stale = [module for module in TESTED_ELSEWHERE if module not in MODULES]
    assert not stale, f"TESTED_ELSEWHERE names modules that are gone: {stale}"


def test_code_names_topics_and_no_numbers_of_notebooks():
    names = "|".join(path.stem for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem != "00_start_here")
    numbered, said = re.compile(rf"(?<!\[)\b[Nn]otebooks? \d\d\b|{names}"), []
    for path in python_files("qtutor", "tools", "bench", "tests"):
        if path.name in ("test_notebooks.py", "test_main.py"):  # they test just that
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if numbered.search(line):
                said.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not said, "the numbers of notebooks change, name the topic:\n" + "\n".join(said)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    assert (ast.get_docstring(TREES[module]) or "").strip(), f"{module} has no docstring"
