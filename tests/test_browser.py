"""A reader's hands: JupyterLab in a real browser, all cells run from the menu, the explorer moved by keyboard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import screenshots

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS = ROOT / "test-artifacts"
NOTEBOOK = ROOT / "notebooks" / "01_number_formats.ipynb"

PICTURE = """async img => {
    const bytes = new Uint8Array(await (await fetch(img.src)).arrayBuffer());
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return {bytes: bytes.length, width: img.naturalWidth, height: img.naturalHeight,
            sha256: [...digest].map(b => b.toString(16).padStart(2, '0')).join('')};
}"""


def need_browser() -> None:
    """Skip where a person has no Chromium; in CI that is a failure, or the test would quietly never run."""
    if screenshots.chromium() is None:
        reason = "there is no Chromium: install it (Debian: apt-get install chromium) or set CHROMIUM to its path"
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(reason)


def picture(locator) -> dict:
    return locator.evaluate(PICTURE)


def changed(page, image, before: dict, seconds: int = 30) -> dict:
    """Return the picture once it differs from ``before`` (or as it is when the time is up)."""
    for _ in range(seconds * 4):
        page.wait_for_timeout(250)
        now = picture(image)
        if now["sha256"] != before["sha256"] and now["width"] > 100:
            break
    return now


def artifact(name: str) -> str:
    ARTIFACTS.mkdir(exist_ok=True)
    return str(ARTIFACTS / name)


@pytest.mark.timeout(420)
def test_format_explorer_moves_in_jupyterlab():
    need_browser()
    with screenshots.Lab([NOTEBOOK]) as lab, screenshots.browser_page() as page:
        script_errors = []
        page.on("pageerror", lambda error: script_errors.append(str(error)))
        screenshots.open_notebook(page, lab, NOTEBOOK.name)
        state = screenshots.run_all(page, timeout=240)
        assert state["errors"] == []
        assert state["done"] == state["cells"] > 5

        explorer = page.locator(".jp-OutputArea .qtutor-format-explorer").first
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
        screenshots.wait_for(page, lambda state: state["kernel"] == "idle", 60, "the pictures in between")
        page.screenshot(path=artifact("explorer_after.png"))
        assert explorer.locator(".widget-readout").first.inner_text() != readout
        assert after["sha256"] != before["sha256"], "the slider moved and the picture did not"
        assert not script_errors
        assert page.refused == [], "JupyterLab asked another host for something"
