"""The command line: ``python -m qtutor doctor | lab | recipes | notebooks | results | model``.

``doctor`` has to work when half of the installation is broken, so nothing but the standard library is
imported at the top, and each check brings what it needs inside a ``try``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from . import QtutorError, __version__

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
START_PAGE = "00_start_here.ipynb"
INSTALL = "run 'make lab', or the pip steps in README.md"
REINSTALL = "start afresh: 'make clean', then 'make lab'"


# ---- doctor ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of the doctor's list.  ``state``: "ok", "note" (the course works without) or "FAIL"."""

    state: str
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"  {self.state:<5} {self.what:<16} {self.found}"
        return f"{line}\n  {'':<22} -> {self.remedy}" if self.remedy else line


def one_line(error: BaseException) -> str:
    """Return what went wrong as one line, without a traceback."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def check_python() -> list[Check]:
    """The interpreter's version is one that the dependencies support."""
    version = platform.python_version()
    where = f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Check("ok", "Python", where)]
    return [Check("FAIL", "Python", where, "use 3.11, 3.12 or 3.13: 'make clean', then 'make lab PYTHON=python3.12'")]


def check_packages() -> list[Check]:
    """Compare what is installed with the bounds in pyproject.toml."""
    import tomllib
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    missing, outside = [], []
    for requirement in map(Requirement, wanted):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            outside.append(f"{requirement.name} {version} (wants {requirement.specifier})")
    if missing:
        return [Check("FAIL", "packages", f"{', '.join(missing)} not installed", INSTALL)]
    if outside:
        return [Check("note", "packages", "; ".join(outside), "pip install -c constraints.txt -e .")]
    return [Check("ok", "packages", f"{len(wanted)} installed, all within pyproject.toml's bounds")]


def check_torch() -> list[Check]:
    """torch loads; which GPU it sees."""
    import torch

    checks = [Check("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            checks.append(Check("ok", "GPU", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute "
                                f"capability {device.major}.{device.minor}, CUDA {torch.version.cuda}"))
    elif shutil.which("nvidia-smi"):
        checks.append(Check("note", "GPU", "there may be one, but this torch cannot use it",
                            "install torch's CUDA build: README.md, 'A GPU machine'"))
    else:
        checks.append(Check("ok", "GPU", "none: the notebooks run on the CPU, at their quick size"))
    return checks


def check_fp8() -> list[Check]:
    """Real Transformer Engine or the emulation; which recipes run on this GPU."""
    from . import te_switch

    status = te_switch.activate()
    if status.real:
        checks = [Check("ok", "FP8 training", f"Transformer Engine {status.version}")]
    else:
        checks = [Check("ok", "FP8 training", f"emulated ({one_line(Exception(status.reason))})")]
    for name, (available, reason) in status.recipes.items():
        found = "runs here" if available else f"not here: {reason}"
        checks.append(Check("ok" if available else "note", f"  {name}", found))
    return checks


def check_llama_cpp() -> list[Check]:
    """The compiled library loads, and its command line tools are beside it."""
    from . import llamacpp

    works, reason = llamacpp.available()
    if not works:
        compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
        remedy = INSTALL if compilers else "install a C++ compiler (apt-get install build-essential), then " + INSTALL
        return [Check("FAIL", "llama.cpp", reason, remedy)]
    import llama_cpp

    offload = "with" if llama_cpp.llama_supports_gpu_offload() else "without"
    checks = [Check("ok", "llama.cpp", f"llama-cpp-python {llama_cpp.__version__}, {offload} GPU offload")]
    found, missing = [], []
    for name in ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench"):
        try:
            llamacpp.tool(name)
            found.append(name)
        except QtutorError:
            missing.append(name)
    if missing:
        checks.append(Check("note", "  its tools", f"{', '.join(missing)} missing",
                            "compile again with tools: pip install --force-reinstall --no-cache-dir --no-deps "
                            "llama-cpp-python with README.md's CMAKE_ARGS"))
    else:
        checks.append(Check("ok", "  its tools", ", ".join(found)))
    return checks


def check_disk() -> list[Check]:
    """Room for temporary files, and a cache that can be written."""
    free = shutil.disk_usage(PROJECT).free / 2**30
    found = f"{free:.1f} GiB free"
    if free < 1:
        return [Check("FAIL", "disk", found, "free some space: the notebooks write up to 1 GiB of temporary files")]
    from . import corpus

    corpus.cache_dir()  # raises where it cannot be written
    return [Check("ok", "disk", f"{found}, cache writable")]


def check_model() -> list[Check]:
    """The model in use is complete, and its weights are finite."""
    from safetensors import safe_open

    from . import course_model

    where = course_model.model_dir()
    if isinstance(where, str):
        return [Check("note", "model", f"QTUTOR_MODEL={where}: a hub name, downloaded when first used")]
    whose = "course model" if Path(where) == course_model.MODEL_DIR else "QTUTOR_MODEL"
    remedy = "git checkout data/model" if whose == "course model" else "set QTUTOR_MODEL to a whole model folder"
    needed = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    missing = [name for name in needed if not (Path(where) / name).is_file()]
    shards = sorted(Path(where).glob("*.safetensors"))
    if missing or not shards:
        missing += [] if shards else ["*.safetensors"]
        return [Check("FAIL", whose, f"{', '.join(missing)} missing in {where}", remedy)]
    json.loads((Path(where) / "config.json").read_text("utf-8"))
    size = sum(shard.stat().st_size for shard in shards)
    weights, broken = 0, ""
    for shard in shards:
        with safe_open(shard, framework="pt") as file:  # checks the header against the length of the file
            for name in file.keys():
                weights += math.prod(file.get_slice(name).get_shape())
                if size < 2**30 and not file.get_tensor(name).isfinite().all():
                    broken = name
    if broken:
        return [Check("FAIL", whose, f"{broken} holds NaN or infinity: the file is damaged", remedy)]
    return [Check("ok", whose, f"intact: {weights / 1e6:.1f} M weights, {size / 1e6:.1f} MB")]


def check_jupyter() -> list[Check]:
    """JupyterLab, the widgets and a kernel are installed."""
    from importlib import metadata

    from jupyter_client.kernelspec import KernelSpecManager

    lab, widgets = metadata.version("jupyterlab"), metadata.version("ipywidgets")
    if "python3" not in KernelSpecManager().find_kernel_specs():
        remedy = "python -m ipykernel install --sys-prefix"
        return [Check("FAIL", "JupyterLab", f"{lab}, but no python3 kernel", remedy)]
    return [Check("ok", "JupyterLab", f"{lab}, ipywidgets {widgets}, a python3 kernel")]


def check_notebooks() -> list[Check]:
    """The notebooks are there and can be read."""
    paths, broken = notebook_paths(), []
    for path in paths:
        try:
            json.loads(path.read_text("utf-8"))["cells"]
        except (ValueError, KeyError):
            broken.append(path.name)
    if broken:
        remedy = f"git checkout notebooks/{broken[0]}"
        return [Check("FAIL", "notebooks", f"{', '.join(broken)} cannot be read", remedy)]
    if not (NOTEBOOKS / START_PAGE).is_file():
        return [Check("FAIL", "notebooks", f"{len(paths)}, without {START_PAGE}", "git checkout notebooks")]
    return [Check("ok", "notebooks", f"{len(paths)} here")]


CHECKS = {
    "Python": (check_python, ""),
    "packages": (check_packages, INSTALL),
    "torch": (check_torch, REINSTALL),
    "FP8 training": (check_fp8, REINSTALL),
    "llama.cpp": (check_llama_cpp, REINSTALL),
    "JupyterLab": (check_jupyter, REINSTALL),
    "disk": (check_disk, ""),
    "course model": (check_model, "git checkout data/model"),
    "notebooks": (check_notebooks, "git checkout notebooks"),
}


def doctor(argv: list[str] | None = None) -> int:
    """Print the check list; return 1 when something that the course needs does not work."""
    argparse.ArgumentParser(prog="qtutor doctor", description=doctor.__doc__).parse_args(argv or [])
    print(f"qtutor {__version__}: what works on this machine\n")
    failed = 0
    for what, (check, remedy) in CHECKS.items():
        try:
            results = check()
        except QtutorError as error:  # says itself what to do
            results = [Check("FAIL", what, one_line(error))]
        except ImportError as error:
            results = [Check("FAIL", what, one_line(error), INSTALL)]
        except Exception as error:  # whatever a broken installation raises
            results = [Check("FAIL", what, f"{type(error).__name__}: {one_line(error)}", remedy)]
        for result in results:
            print(result, flush=True)
            failed += result.state == "FAIL"
    print("\n" + (f"{failed} to put right." if failed else "All that the course needs is here: make lab opens it."))
    return 1 if failed else 0


# ---- lab, recipes ----------------------------------------------------------------------------------------


def lab(argv: list[str]) -> int:
    """Open JupyterLab on the start page; further arguments go to ``jupyter lab``."""
    if not (NOTEBOOKS / START_PAGE).is_file():
        raise QtutorError(f"notebooks/{START_PAGE} is missing: restore it with 'git checkout notebooks'.")
    if importlib.util.find_spec("jupyterlab") is None:
        raise QtutorError(f"JupyterLab is not installed: {INSTALL}.")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={PROJECT}",
               f"--LabApp.default_url=/lab/tree/notebooks/{START_PAGE}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # a container: there is nobody else to be
    try:
        return subprocess.call([*command, *argv], cwd=PROJECT)
    except KeyboardInterrupt:
        return 0


def notebook_paths() -> list[Path]:
    """Return the course's notebooks, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def recipes(argv: list[str]) -> int:
    """Print the recipe cells of all notebooks, or of those whose numbers are given: ``recipes 01 08``."""
    parser = argparse.ArgumentParser(prog="qtutor recipes", description=recipes.__doc__)
    parser.add_argument("notebook", nargs="*", help="number of a notebook, such as 08")
    wanted = [number.zfill(2) for number in parser.parse_args(argv).notebook]
    paths = [path for path in notebook_paths() if not wanted or path.name[:2] in wanted]
    known = {path.name[:2] for path in paths}
    if unknown := [number for number in wanted if number not in known]:
        have = ", ".join(path.name[:2] for path in notebook_paths()) or "none"
        raise QtutorError(f"There is no notebook {unknown[0]}: choose from {have}.")
    for path in paths:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        for before, cell in zip([None, *cells], cells, strict=False):
            if "recipe" not in cell.get("metadata", {}).get("tags", []):
                continue
            said = "".join(before["source"]).strip() if before and before["cell_type"] == "markdown" else ""
            last = said.rpartition("Recipe: ")[2].rpartition("\n\n")[2]  # "Recipe: ..." may take several lines
            title = " ".join(re.sub(r"[#*`]", "", last).split()) or "without a title"
            print("\n".join(textwrap.wrap(f"---- {path.stem[:2]} · Recipe: {title}", 116, initial_indent="# ",
                                          subsequent_indent="# ", break_long_words=False)) + "\n")  # fmt: skip
            print("".join(cell["source"]).rstrip() + "\n")
    return 0


# ---- the command -----------------------------------------------------------------------------------------


def _delegate(module: str):
    def command(argv: list[str]) -> int:
        return importlib.import_module(f"qtutor.{module}").main(argv) or 0

    return command


COMMANDS = {
    "doctor": (doctor, "check what works on this machine, and what to do about the rest"),
    "lab": (lab, "open JupyterLab on the start page (further arguments go to jupyter lab)"),
    "recipes": (recipes, "print the recipe cells: recipes 01 08"),
    "notebooks": (_delegate("notebooks"), "list, check, restore or run the notebooks"),
    "results": (_delegate("report"), "write or check the tables of results, or record them again"),
    "model": (_delegate("course_model"), "evaluate or try the model in use"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: python -m qtutor COMMAND [options]\n\n{listing}"
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"qtutor {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"qtutor: there is no command {argv[0]!r}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[argv[0]][0](argv[1:])
    except QtutorError as error:
        print(f"qtutor: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"qtutor: {one_line(error)}: {INSTALL}.", file=sys.stderr)
    except BrokenPipeError:  # python -m qtutor recipes | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
