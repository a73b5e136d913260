"""Look at a notebook as a reader does: JupyterLab in headless Chromium, on a copy of the notebook.

    python tests/screenshots.py notebooks/00_start_here.ipynb --out test-artifacts/00
    python tests/screenshots.py notebooks/*.ipynb --out test-artifacts --as-committed

runs all cells through the menu, then writes one PNG for each screenful down the page.  ``Lab`` and
``open_notebook`` are what tests/test_browser.py drives.  Nothing in the working tree is changed: the
server has its own folder, settings and port, and requests to other hosts are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM_FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
    --disable-background-networking --disable-component-update --disable-sync""".split()
ROOT = Path(__file__).resolve().parent.parent
AXE = ROOT / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"  # `make axe` brings it

# A question about news would cover the page on first start.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    if (!panel || !panel.content || !panel.content.model) return null;
    const cells = [...panel.content.model.cells].map(c => c.toJSON());
    const code = cells.filter(c => c.cell_type === 'code' && [].concat(c.source).join('').trim());
    const errors = code.flatMap(c => c.outputs.filter(o => o.output_type === 'error')
        .map(o => o.ename + ': ' + o.evalue));
    const kernel = panel.sessionContext.session?.kernel;
    return {cells: code.length, done: code.filter(c => c.execution_count !== null).length, errors,
            pending: panel.content.node.querySelectorAll('.jp-InputPrompt').length ?
                [...panel.content.node.querySelectorAll('.jp-InputPrompt')]
                    .filter(p => p.textContent.includes('*')).length : 0,
            kernel: kernel ? kernel.status : 'none'};
}"""


def serious(page, context: str = "document") -> list[tuple[str, str]]:
    """(rule, first place) of axe's serious and critical complaints about ``context``, on a page with AXE."""
    said = page.evaluate(f"axe.run({context}, {{resultTypes: ['violations']}})")["violations"]
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in said if one["impact"] in ("serious", "critical")]


class Lab:
    """A JupyterLab server on copies of ``notebooks``; a context manager.  ``clear`` strips their outputs."""

    def __init__(self, notebooks: list[Path], clear: bool = True, settings: dict | None = None):
        self.notebooks, self.clear = [Path(path) for path in notebooks], clear
        self.settings = {**SETTINGS, **(settings or {})}
        self.token = secrets.token_hex(16)

    def __enter__(self) -> Lab:
        self.folder = Path(tempfile.mkdtemp(prefix="qtutor-lab-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        work = self.folder / "notebooks"
        work.mkdir()
        for path in self.notebooks:
            text = json.dumps(cleared(path)) if self.clear else path.read_text("utf-8")
            (work / path.name).write_text(text, "utf-8")
        for name, value in self.settings.items():
            file = self.folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        private = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES")
        private = {f"{name}_DIR": str(self.folder / name.lower()) for name in private}
        private["JUPYTERLAB_SETTINGS_DIR"] = str(self.folder / "settings")
        self.log = self.folder / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                 f"--port={self.port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={work}",
                 f"--IdentityProvider.token={self.token}", "--LabApp.expose_app_in_browser=True",
                 "--LabApp.extension_manager=readonly"],
                env={**os.environ, **private}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=30)
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.3)

    def url(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?reset&token={self.token}"

    def __exit__(self, *_) -> None:
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.terminate()  # the server shuts its kernels down
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def cleared(path: Path) -> dict:
    """Return the notebook's JSON without outputs, execution counts and widget state."""
    notebook = json.loads(Path(path).read_text("utf-8"))
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return notebook


def handler(folder: Path):
    """A request handler that serves a folder without a word."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    return functools.partial(Quiet, directory=str(folder))


@contextlib.contextmanager
def browser_page(width: int = 1366, height: int = 768):
    """Yield a playwright page in headless Chromium that can reach this machine only."""
    from playwright.sync_api import sync_playwright

    from tools.site import chromium

    executable = chromium()
    if executable is None:
        raise RuntimeError("There is no Chromium: install it (apt-get install chromium) or set CHROMIUM.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(180_000)
        page.refused = []

        def gate(route):
            if route.request.url.split("/")[2].split(":")[0] in ("127.0.0.1", "localhost"):
                route.continue_()
            else:
                page.refused.append(route.request.url)
                route.abort()

        page.route("http*://**/*", gate)
        try:
            yield page
        finally:
            browser.close()


def open_notebook(page, lab: Lab, name: str) -> None:
    """Open ``name`` in JupyterLab and wait until its kernel answers."""
    page.goto(lab.url(name), wait_until="domcontentloaded")
    page.locator(".jp-NotebookPanel .jp-Notebook").first.wait_for()
    wait_for(page, lambda state: state["kernel"] == "idle", 300, "the kernel to start")


def run_all(page, timeout: float = 300) -> dict:
    """Choose Run > Run All Cells as a reader would, wait until the kernel is idle; return the final state.

    Raises AssertionError with the first error when a cell fails.
    """
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator(".lm-Menu-item", has_text="Run All Cells").first.click()

    def finished(s):
        return s["errors"] or (s["kernel"] == "idle" and s["done"] == s["cells"] and not s["pending"])

    state = wait_for(page, finished, timeout, "all cells to run")
    page.wait_for_timeout(1500)  # let the last pictures and widgets paint
    return state


def wait_for(page, condition, timeout: float, what: str) -> dict:
    """Poll the notebook's state until ``condition(state)``; a dialog about the kernel is an error."""
    deadline, state = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        state = page.evaluate("() => !!window.jupyterapp") and page.evaluate(STATE)
        if state and condition(state):
            return state
        if state and state["kernel"] in ("dead", "autorestarting"):
            raise AssertionError(f"the kernel died while waiting for {what}: {state}")
        page.wait_for_timeout(400)
    raise AssertionError(f"waited {timeout:.0f} s for {what}; the last state was {state}")


def hide_sidebar(page) -> None:
    """Give the notebook the whole width."""
    page.evaluate("""async () => {
        const app = window.jupyterapp;
        if (!app.shell.leftCollapsed) app.shell.collapseLeft();
        if (!app.shell.rightCollapsed) app.shell.collapseRight();
    }""")
    page.wait_for_timeout(400)


def screenfuls(page, folder: Path, prefix: str, limit: int = 80, look=lambda: None) -> list[Path]:
    """Scroll down one screen at a time; write ``prefix_NN.png`` for each, and ``look``; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    scroll = """([top]) => {
        const panel = window.jupyterapp.shell.currentWidget.node;
        const outer = panel.querySelector('.jp-WindowedPanel-outer') || panel.querySelector('.jp-Notebook');
        outer.scrollTop = top;
        return [outer.scrollTop, outer.clientHeight, outer.scrollHeight];
    }"""
    paths, top = [], 0
    for number in range(limit):
        page.evaluate(scroll, [top])
        page.wait_for_timeout(350)
        at, height, total = page.evaluate(scroll, [top])
        path = folder / f"{prefix}_{number:02d}.png"
        page.screenshot(path=str(path))
        paths.append(path)
        look()
        if at + height >= total - 4 or (number and at < top):
            break
        top = at + height - 60  # a little overlap, so that no line is cut in two
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "test-artifacts" / "screens")
    parser.add_argument("--size", default="1366x768", help="viewport, WIDTHxHEIGHT (default 1366x768)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for all cells of one notebook")
    parser.add_argument("--as-committed", action="store_true", help="do not run: show the saved outputs")
    parser.add_argument("--with-sidebar", action="store_true", help="leave the file browser open")
    args = parser.parse_args(argv)
    width, height = map(int, args.size.split("x"))
    failed = 0
    settings = {"notebook-extension/tracker": {"windowingMode": "none"}}
    for path in args.notebooks:
        problems = []
        with (Lab([path], clear=not args.as_committed, settings=settings) as lab,
              browser_page(width, height) as page):
            page.on("pageerror", lambda error, seen=problems: seen.append(f"script error: {error}"))
            try:
                open_notebook(page, lab, path.name)
                if not args.with_sidebar:
                    hide_sidebar(page)
                if not args.as_committed:
                    problems += run_all(page, args.timeout)["errors"]
            except Exception as error:  # show what there is to see, then go on with the next one
                problems.append(str(error).splitlines()[0])
            paths = screenfuls(page, args.out, path.stem)
            problems += [f"refused a request to {url}" for url in page.refused[:5]]
        print(f"{path.name}: {len(paths)} screenfuls, {paths[0]} to {paths[-1].name}", flush=True)
        for problem in problems:
            print(f"  {problem}")
        failed += bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # tools; beside this file there is another folder of that name
    sys.exit(main())
