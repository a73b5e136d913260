"""The course as a static book: ``python -m tools.site build | links``.

Sphinx reads docs/ and the notebooks where they are (docs/conf.py).  What a page shows of data/results is computed here
when the site is built: a page has a line ``<!-- name -->`` where the block of that name goes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qtutor import QtutorError, files, formats, results

from . import command, editions, notebooks, report

OUT = files.ROOT / "build" / "site"
PDF = "_static/cheatsheet.pdf"
_LINK = re.compile(r"(?:\[([^\[\]]*)\]\(|<)?(https?://[^\s)>\]\"'`|}]+[^\s)>\]\"'`|}.,;:])")
PAPERS = ("arxiv.org/abs/", "usenix.org/conference/")  # these have entries in docs/references.bib


def anchor(heading: str) -> str:
    """The anchor of a heading, as JupyterLab makes it: a link within the notebooks leads there on the site, too."""
    return heading.replace(" ", "-")


def chromium() -> str | None:
    """Return the path of a Chromium or Chrome on this machine (``CHROMIUM`` overrides), or None."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _table(head: list[str], rows) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _headlines() -> str:
    said = []
    for question, machine, data, answer in report.headlines():
        source = f"[{data.name}](../data/results/{machine}/{data.name}.json)"
        about = next(n for n in notebooks.names() if n.endswith(report.RESULTS[data.name].topic))
        said.append(f"## {question}\n\n{answer}\n\n*{data.device}, {data.created[:10]};* {source}, notebook "
                    f"[{about[:2]}](../notebooks/{about}.ipynb)")  # fmt: skip
    return "\n\n".join(said)


def _rules() -> str:
    return "\n".join(f"- **{question}** {answer.replace('**', '')} ({data.device})"
                     for question, _, data, answer in report.headlines())  # fmt: skip


def _formats() -> str:
    rows = [(name, f.bits, f"{f.max:,g}", f"{getattr(f, 'min_normal', 1):.3g}", f"{getattr(f, 'min_subnormal', 1):.3g}",
             len(f.grid())) for name, f in formats.FORMATS.items() if name not in ("INT5", "INT7")]  # fmt: skip
    return _table(["format", "bits", "largest", "smallest normal", "smallest > 0", "numbers"], rows)


def _types() -> str:
    rows, found = {}, results.load("gguf_quality", "cpu")
    for row in found.rows:
        line = rows.setdefault(row["type"], [row["type"], f"{row['bits_per_weight']:.2f}", "", ""])
        line[3 if row["imatrix"] else 2] = f"{row['kld_mean']:.4f}"
        line[1] = f"{row['bits_per_weight']:.2f}"
    shown = [line for line in rows.values() if not re.match(r"B?F16|[TM]|NV|Q[12]_0|Q._[15]|IQ[123]_X", line[0])]
    return _table(["type", "bits per weight", "KLD", "KLD, imatrix"], shown)


def _pdf() -> str:
    return f'<a href="../{PDF}">As PDF, two pages</a>' if chromium() else "Print this page: it fits two pages of A4."


def _buttons() -> str:
    """Badges that open the published course elsewhere; $REPOSITORY (owner/name) says where it is published."""
    where = os.environ.get("REPOSITORY", "")
    if not where:
        return "*This site was built without an address.*"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise QtutorError(f"REPOSITORY is {where!r}: give owner/name.")
    rows = [[f"{name[:2]} · {notebooks.title(notebooks.find(name))}",
             f"[Colab](https://colab.research.google.com/github/{where}/blob/main/notebooks/{name}.ipynb)"]
            for name in notebooks.names()]  # fmt: skip
    return f"[Open in Codespaces](https://codespaces.new/{where})\n\n" + _table(["notebook", "open in"], rows)


def prepared(name: str, text: str) -> str:
    """The text of a page as the site shows it: notebooks without their navigation, pages with their blocks."""
    if name.startswith("notebooks/"):
        nb = json.loads(text)
        nb["cells"] = [cell for cell in nb["cells"] if "nav" not in notebooks.tags(cell)]
        return json.dumps(nb)
    return re.sub(r"^<!-- (\w+) -->$", lambda m: BLOCKS[m[1]]() if m[1] in BLOCKS else m[0], text, flags=re.M)


def alternative_texts(name: str) -> list[str]:
    """The alternative texts of a notebook's pictures, in order; "" for a picture that has none yet."""
    cells = files.read_json(notebooks.find(name), "notebook")["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    return [output["metadata"].get("image/png", {}).get("alt", "") for output in outputs]


def build(out: Path = OUT) -> Path:
    """Build the site into a folder, from scratch, and the cheat sheet's PDF where there is Chromium; return the folder.

    Raises QtutorError where Sphinx is missing, warns or fails, or a link within the site leads nowhere.
    """
    try:
        import myst_nb  # noqa: F401
    except ImportError:
        raise QtutorError("Sphinx is not installed here: 'make site' installs what the site needs, or "
                          "pip install -c constraints.txt -e '.[test]'.") from None  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["-b", "html", "-q", "-W", "--keep-going", "-c", str(files.ROOT / "docs"),
                 "-d", str(out.with_name(f"{out.name}-doctrees"))]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "sphinx", *arguments, str(files.ROOT), str(out)],
                          capture_output=True, text=True, cwd=files.ROOT)  # fmt: skip
    if done.returncode:
        raise QtutorError(f"Sphinx has something to say, correct it:\n{done.stderr.strip()}")
    files.write_text(out / "index.html", '<!doctype html><html lang="en"><title>LLM quantization</title>'
                     '<meta http-equiv="refresh" content="0; url=docs/index.html">'
                     '<a href="docs/index.html">LLM quantization</a></html>')  # fmt: skip
    if chromium():
        subprocess.run([chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
                        f"--print-to-pdf={out / PDF}", (out / "docs" / "cheatsheet.html").as_uri()],
                       check=True, capture_output=True, timeout=300)  # fmt: skip
    if wrong := broken(out):
        raise QtutorError("Links that lead nowhere:\n" + "\n".join(wrong))
    return out


class _Page(HTMLParser):
    """The links (``href`` and ``src``) and the anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links |= {found[key] for key in ("href", "src") if found.get(key)}


def broken(out: Path) -> list[str]:
    """Links within the site that lead to no file or no anchor: "page: link", an empty list when there is none."""
    pages, wrong = {path.resolve(): _Page(path) for path in sorted(Path(out).rglob("*.html"))
                    if path.parent.name != "_static"}, []  # the theme leaves its templates there
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            missing = parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            if not target.exists() or missing:
                wrong.append(f"{path.relative_to(Path(out).resolve())}: {link}")
    return wrong


def cited() -> dict[str, tuple[str, list[str]]]:
    """{address: (the longest words that link to it, names of the notebooks)} for other hosts, from all prose."""
    words, where = {}, {}
    for name in notebooks.names():
        for cell in files.read_json(notebooks.find(name), "notebook")["cells"]:
            if cell["cell_type"] == "markdown":
                for said, url in _LINK.findall(" ".join("".join(cell["source"]).split())):
                    words[url] = max(words.get(url, ""), said, key=len)
                    where.setdefault(url, []).append(name)
    return {url: (words[url] or url, sorted(set(where[url]))) for url in sorted(where)}


def _documents() -> str:
    lines, host = [], ""
    for url, (words, names) in cited().items():
        if any(part in url for part in PAPERS):
            continue
        if urlsplit(url).netloc != host:
            host = urlsplit(url).netloc
            lines.append(f"\n**{host}**\n")
        places = ", ".join(f"[{name[:2]}](../notebooks/{name}.ipynb)" for name in names)
        lines.append(f"- [{words}]({url}), in {places}")
    return "\n".join(lines)


def links(out: Path) -> tuple[Path, int]:
    """Ask for every address that the notebooks cite; write a dated report; return its path and how many failed."""
    import httpx

    rows, failed = [], 0
    with httpx.Client(follow_redirects=True, timeout=20, headers={"user-agent": "Mozilla/5.0 (link check)"}) as client:
        for url, (_, names) in cited().items():
            try:
                answer = client.get(url)
                said = str(answer.status_code)
                if str(answer.url).split("#")[0] != url.split("#")[0]:
                    said += f", now {answer.url}"
                failed += answer.status_code >= 400
            except httpx.HTTPError as error:
                said, failed = f"no answer ({type(error).__name__})", failed + 1
            rows.append([f"<{url}>", said, ", ".join(name[:2] for name in names)])
    head = f"# Links to other hosts, {date.today().isoformat()}\n\n{len(rows)} addresses, {failed} failed\n\n"
    return files.write_text(out, head + _table(["address", "answer", "notebooks"], rows) + "\n"), failed


BLOCKS: dict[str, Callable[[], str]] = {
    "buttons": _buttons, "documents": _documents, "formats": _formats, "headlines": _headlines, "pdf": _pdf,
    "programmes": editions.programmes, "rules": _rules, "types": _types,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """``build | links``; return 1 where an address does not answer."""
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("build", "links"))
    parser.add_argument("--out", type=Path, help="folder of the site (build/site), or file of the report")
    options = parser.parse_args(argv)
    if options.action == "build":
        print(f"written: {build(options.out or OUT)}/index.html")
        return 0
    path, failed = links(options.out or OUT.with_name("links.md"))
    print(f"{failed} addresses failed: {path}")
    return int(failed > 0)


if __name__ == "__main__":
    command(main)
