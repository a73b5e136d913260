"""The site: it builds without a warning, its links lead somewhere, and what it shows comes from data and notebooks."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import screenshots

from qtutor import QtutorError, files, results
from tools import notebooks, report, site

DOCS = files.ROOT / "docs"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if importlib.util.find_spec("myst_nb") is None:
        reason = "Sphinx is not installed: pip install -c constraints.txt -e '.[test]'"
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(reason)
    return site.build(tmp_path_factory.mktemp("site") / "site")  # raises where Sphinx warns or a link is broken


def page(built, name: str) -> str:
    return (built / f"{name}.html").read_text("utf-8")


@pytest.mark.slow
def test_every_notebook_is_there_with_its_outputs_and_texts(built):
    for name in notebooks.names():
        html = page(built, f"notebooks/{name}")
        texts = site.alternative_texts(name)
        assert html.count('<img alt="') >= len(texts) > 0
        assert len(set(re.findall(r'<img alt="([^"]*)"', html)) - {""}) >= len(set(texts) - {""})
        assert ">Contents</a>" not in html.split("<article")[1].split("</article")[0], "its own navigation is left out"
        assert 'href="../docs/glossary.html#term-' in html, f"{name} links no term of the glossary"


@pytest.mark.slow
def test_a_term_is_linked_once_in_a_notebook_and_never_in_code_or_output(built):
    article = page(built, f"notebooks/{notebooks.find('number_formats').stem}").split("<article")[1]
    targets = re.findall(r'href="\.\./docs/glossary\.html#(term-[\w-]+)"', article)
    assert "term-E4M3" in targets and len(targets) == len(set(targets))
    assert not re.search(r'<div class="cell_output[^"]*">(?:(?!</div>).)*term-', article, re.S)


@pytest.mark.slow
def test_nothing_is_asked_of_another_host(built):
    asked = re.compile(r"<(?:script|img|iframe)[^>]* src=[\"'](https?:)?//|<link[^>]*rel=[\"']stylesheet[\"'][^>]*//")
    for path in built.rglob("*.html"):
        assert not asked.search(path.read_text("utf-8").replace('rel="canonical"', "")), path


@pytest.mark.slow
def test_results_and_cheat_sheet_show_what_is_recorded(built):
    text = re.sub(r"<[^>]+>", "", page(built, "docs/results"))
    for question, _, data, _ in report.headlines():
        assert question in text and data.device in text
    row = next(r for r in results.load("gguf_quality", "cpu").rows if r["type"] == "Q4_K_M" and not r["imatrix"])
    sheet = re.sub(r"<[^>]+>", " ", page(built, "docs/cheatsheet"))
    assert re.search(rf"Q4_K_M\s+{row['bits_per_weight']:.2f}\s+{row['kld_mean']:.4f}", sheet)
    assert "57,344" in sheet and not re.search(r"<!-- \w+ -->", page(built, "docs/cheatsheet"))


@pytest.mark.slow
@pytest.mark.skipif(site.chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_cheat_sheet_prints_on_two_pages(built):
    pdf = (built / site.PDF).read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 2


@pytest.mark.slow
@pytest.mark.skipif(site.chromium() is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1366])
def test_in_a_browser(built, width):
    """No page is wider than its window, search finds a word, and axe (`make axe`) has no serious complaint of ours."""
    pages = ["docs/index", "docs/cheatsheet", "docs/troubleshooting", "data/results/README",
             *(f"notebooks/{name}" for name in notebooks.names())]  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), screenshots.handler(built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, found = f"http://127.0.0.1:{server.server_port}", []
    try:
        with screenshots.browser_page(width, 800) as browser:
            for name in pages:
                browser.goto(f"{root}/{name}.html")
                wide = browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                found += [f"{name}: {wide} pixels too wide"] if wide > 0 else []
                if screenshots.AXE.is_file():
                    browser.add_script_tag(path=str(screenshots.AXE))
                    found += [f"{name}: {rule}: {place}" for rule, place in screenshots.serious(browser)]
            browser.goto(f"{root}/search.html?q=straight-through")
            browser.locator("#search-results li a").first.wait_for()
            assert not browser.refused, "the site asked another host for something"
    finally:
        server.shutdown()
    assert not found, "\n".join(found)


def test_papers_and_notebooks_are_in_step():
    listed = set(re.findall(r"url=\{(.*?)\}\}", (DOCS / "references.bib").read_text("utf-8")))
    cited = {url for url in site.cited() if any(part in url for part in site.PAPERS)}
    assert listed == cited


def test_troubleshooting_quotes_messages_that_exist():
    def text(node) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else ""

    said = [re.sub(r"\$\$\(\$\([A-Z]+\)[^)]*\)|\$\([A-Z]+\)", "…", (files.ROOT / "Makefile").read_text("utf-8"))]
    for path in (files.ROOT / "qtutor").rglob("*.py"):
        said += [text(node) for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    quoted = re.findall(r"^\| `(.*?)` \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M)
    assert len(quoted) > 20
    for message in quoted:
        assert any(message in one for one in said), f"no code says {message!r}"


def test_glossary_terms_are_sorted_and_used():
    terms = re.findall(r"^(\S.*)\n(?=    \S)", (DOCS / "glossary.md").read_text("utf-8"), re.M)
    assert len(terms) == len(set(terms)) > 40
    prose = " ".join("".join(cell["source"]) for name in notebooks.names()
                     for cell in json.loads(notebooks.find(name).read_text("utf-8"))["cells"])  # fmt: skip
    assert [t for t in terms if t.removesuffix(" (phase)").lower() not in prose.lower()] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a href="c.html">c</a><a href="#no">d</a>', "utf-8")
    (tmp_path / "b.html").write_text('<p id="here"><a href="a.html#here">a</a><a href="https://x.org/">x</a>', "utf-8")
    assert site.broken(tmp_path) == ["a.html: #no", "a.html: c.html", "b.html: a.html#here"]


def test_links_to_other_hosts_get_a_dated_report(tmp_path, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/ok": 200, "/moved": 301}.get(self.path, 404))
            self.send_header("Location", "/ok")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    wanted = {f"{root}/ok": ("x", ["00_a"]), f"{root}/moved": ("x", ["01_b"]), f"{root}/gone": ("x", ["01_b"]),
              "http://127.0.0.1:9/": ("x", ["02_c"])}  # fmt: skip
    monkeypatch.setattr(site, "cited", lambda: wanted)
    try:
        path, failed = site.links(tmp_path / "links.md")
    finally:
        server.shutdown()
    text = path.read_text("utf-8")
    assert failed == 2 and "4 addresses, 2 failed" in text and re.search(r"hosts, 20\d\d-\d\d-\d\d", text)
    assert f"/moved> | 200, now {root}/ok | 01 |" in text and "/gone> | 404 | 01 |" in text and "ConnectError" in text


def test_buttons_lead_where_the_course_is_published(monkeypatch):
    monkeypatch.delenv("REPOSITORY", raising=False)
    assert "without an address" in site.BLOCKS["buttons"]()
    monkeypatch.setenv("REPOSITORY", "somebody/course")
    assert "https://codespaces.new/somebody/course" in site.BLOCKS["buttons"]()
    monkeypatch.setenv("REPOSITORY", "https://example.org")
    with pytest.raises(QtutorError, match="owner/name"):
        site.BLOCKS["buttons"]()
