"""A reader's hands: JupyterLab in a real browser, all cells run from the menu, the explorer moved by keyboard."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
import screenshots

from qtutor import files
from tools import notebooks, site

pytestmark = pytest.mark.slow
ARTIFACTS = files.ROOT / "test-artifacts"
NOTEBOOK = notebooks.find("number_formats")

PICTURE = """async img => {
    const bytes = new Uint8Array(await (await fetch(img.src)).arrayBuffer());
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return {bytes: bytes.length, width: img.naturalWidth, height: img.naturalHeight,
            sha256: [...digest].map(b => b.toString(16).padStart(2, '0')).join('')};
}"""


def need_browser() -> None:
    """Skip where a person has no Chromium; in CI that is a failure, or the test would quietly never run."""
    if site.chromium() is None:
        reason = "there is no Chromium: install it (Debian: apt-get install chromium) or set CHROMIUM to its path"
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(reason)


def picture(locator) -> dict:
    return locator.evaluate(PICTURE)


def changed(page, image, before: dict, seconds: int = 120) -> dict:
    """Return the picture once it differs from ``before`` (or as it is when the time is up)."""
    for _ in range(seconds * 4):
        page.wait_for_timeout(250)
        now = picture(image)
        if now["sha256"] != before["sha256"] and now["width"] > 100:
            break
    return now


def only(notebook: Path, call: str, folder: Path) -> Path:
    """Write a notebook of the setup cell and one that shows the explorer: a short run of the same widget."""
    cells = nbformat.read(notebook, as_version=4).cells
    assert sum(cell.source.strip() == call for cell in cells) == 1, f"{notebook.name} has no cell {call!r}"
    setup = next(cell.source for cell in cells if cell.cell_type == "code")
    short = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    bring = "from qtutor.figures import fp8 as figures"
    short.cells = [nbformat.v4.new_code_cell(source) for source in (setup, bring, call)]
    path = folder / notebook.name
    nbformat.write(short, path)
    return path


def artifact(name: str) -> str:
    ARTIFACTS.mkdir(exist_ok=True)
    return str(ARTIFACTS / name)


def test_bit_explorer_moves_in_jupyterlab():
    need_browser()
    with screenshots.Lab([NOTEBOOK]) as lab, screenshots.browser_page() as page:
        script_errors = []
        page.on("pageerror", lambda error: script_errors.append(str(error)))
        screenshots.open_notebook(page, lab, NOTEBOOK.name)
        state = screenshots.run_all(page, timeout=500)
        assert state["errors"] == []
        assert state["done"] == state["cells"] > 5

        explorer = page.locator(".jp-OutputArea .qtutor-bit-explorer").first
        explorer.scroll_into_view_if_needed()
        image = explorer.locator("img.qtutor-explorer-picture").first
        page.wait_for_function("img => img.complete && img.naturalWidth > 100", arg=image.element_handle())
        before = picture(image)
        page.screenshot(path=artifact("explorer_before.png"))

        slider = explorer.locator(".noUi-handle").first
        slider.focus()
        readout = explorer.locator(".widget-readout").first.inner_text()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        after = changed(page, image, before)
        screenshots.wait_for(page, lambda state: state["kernel"] == "idle", 300, "the pictures in between")
        page.screenshot(path=artifact("explorer_after.png"))
        assert explorer.locator(".widget-readout").first.inner_text() != readout
        assert after["sha256"] != before["sha256"], "the slider moved and the picture did not"
        sign = explorer.get_by_role("button").first
        assert explorer.locator("p").inner_text().startswith("+ (") and sign.inner_text() == "0"
        sign.focus()
        page.keyboard.press("Space")
        explorer.locator("p", has_text="− (").wait_for()
        assert sign.inner_text() == "1" and sign.evaluate("node => node === document.activeElement")
        assert not script_errors
        assert page.refused == [], "JupyterLab asked another host for something"


def test_scaling_explorer_steps_in_jupyterlab(tmp_path):
    need_browser()
    notebook = only(notebooks.find("fp8_scaling"), "figures.scaling_explorer()", tmp_path)
    with screenshots.Lab([notebook]) as lab, screenshots.browser_page() as page:
        script_errors = []
        page.on("pageerror", lambda error: script_errors.append(str(error)))
        screenshots.open_notebook(page, lab, notebook.name)
        assert screenshots.run_all(page, timeout=400)["errors"] == []
        explorer = page.locator(".jp-OutputArea", has=page.locator("img.qtutor-explorer-picture")).first
        explorer.scroll_into_view_if_needed()
        image = explorer.locator("img.qtutor-explorer-picture").first
        page.wait_for_function("img => img.complete && img.naturalWidth > 100", arg=image.element_handle())

        def move(what):
            before = picture(image)
            what()
            assert changed(page, image, before)["sha256"] != before["sha256"], "the picture stayed as it was"
            screenshots.wait_for(page, lambda state: state["kernel"] == "idle", 300, "the picture")

        explorer.locator(".noUi-handle").last.focus()  # of the step
        for _ in range(4):
            move(lambda: page.keyboard.press("ArrowRight"))
        assert "Step 9" in explorer.inner_text()
        for place, choice in enumerate(("growth without end", "most_recent")):
            move(lambda place=place, choice=choice: explorer.locator("select").nth(place).select_option(choice))
        explorer.locator(".noUi-handle").first.focus()
        move(lambda: page.keyboard.press("ArrowLeft"))
        page.screenshot(path=artifact("scaling_explorer.png"))
        assert not script_errors
        assert page.refused == [], "JupyterLab asked another host for something"


DECIDING = '''from qtutor import results
from qtutor.decide import pareto
from qtutor.figures import choosing, planner
from qtutor.figures import pareto as fronts
planner.planner("Llama-2-70B", "Q6_K", "H100 SXM")
---
recorded = results.load("tradeoff", "cpu")
rows = pareto.with_cost(pareto.measured(recorded), 0.05, 475, 1.2)
fronts.explorer(rows, recorded.device)
---
choosing.explorer(model="Llama-2-70B", device="H100 SXM", users=8, tokens_per_s=10, max_loss=0.005)
---
from qtutor.figures import fp8_on_several_gpus
fp8_on_several_gpus.plan(results.load("fp8_scaling", "h200x4").frame().dropna(subset=["ms_per_step"]))'''


def test_the_planner_the_fronts_and_the_guide_answer_in_jupyterlab(tmp_path):
    """Widgets of planning, trade-off, choosing, many GPUs: choose something else; picture or sentence change."""
    need_browser()
    short = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    cells = ["import qtutor\nqtutor.setup()", *DECIDING.split("\n---\n")]
    short.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook = tmp_path / "deciding.ipynb"
    nbformat.write(short, notebook)
    with screenshots.Lab([notebook]) as lab, screenshots.browser_page() as page:
        script_errors = []
        page.on("pageerror", lambda error: script_errors.append(str(error)))
        screenshots.open_notebook(page, lab, notebook.name)
        assert screenshots.run_all(page, timeout=400)["errors"] == []
        for number, (label, choice, says) in enumerate((("type", "Q8_0", "Q8_0"), ("batch", "8", None),
                                                        ("users at once", "1", "Q8_0"),
                                                        ("GPUs", "512", None))):  # fmt: skip
            cell = page.locator(".jp-CodeCell").nth(number + 1)
            cell.scroll_into_view_if_needed()
            image, words = cell.locator("img.qtutor-explorer-picture"), cell.locator(".jp-OutputArea")
            seen = picture(image.first)["sha256"] if image.count() else words.inner_text()
            control = cell.locator(".widget-dropdown", has_text=label).locator("select").first
            control.select_option(label=choice)
            for _ in range(480):
                page.wait_for_timeout(250)
                now = picture(image.first)["sha256"] if image.count() else words.inner_text()
                if now != seen:
                    break
            page.screenshot(path=artifact(f"deciding_{number}.png"))
            assert now != seen, f"choosing {choice} as {label!r} changed nothing"
            assert says is None or says in words.inner_text()
            screenshots.wait_for(page, lambda state: state["kernel"] == "idle", 300, "the widget")
        assert not script_errors
        assert page.refused == [], "JupyterLab asked another host for something"


@pytest.mark.skipif(not screenshots.AXE.is_file(), reason="axe is not here: make axe")
@pytest.mark.parametrize("name", notebooks.names())
def test_axe_has_no_serious_complaint_about_what_we_show(name, tmp_path):
    """Prose and stored outputs of each notebook in JupyterLab, screen by screen: it draws no other cells."""
    found = {}

    def look():
        found.update(screenshots.serious(page, "{include: [['.jp-OutputArea-output'], ['.jp-RenderedMarkdown']]}"))

    need_browser()
    with screenshots.Lab([notebooks.find(name)]) as lab, screenshots.browser_page() as page:
        screenshots.open_notebook(page, lab, f"{name}.ipynb")
        page.add_script_tag(path=str(screenshots.AXE))
        screenshots.screenfuls(page, tmp_path, "axe", look=look)
    assert not found
