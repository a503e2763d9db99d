"""Links from pages to files of the repository outside `docs/`.

Pages link to these files by relative path, so that the links also work where the repository is browsed. In the site a
page of `results/` is a page, and any other text file is a page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_AT_ROOT = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
RESULTS = "benchmark/results/"


def linked_pages(pages: dict[str, str]) -> dict[str, str | bytes]:
    """Return the copies of all files outside `docs/` that these pages link to, and that those link to in turn."""
    made: dict[str, str | bytes] = {}
    waiting = list(pages.items())
    while waiting:
        uri, text = waiting.pop()
        for match in _LINK.finditer(text):
            path = _outside(match["target"], uri)
            copy_uri = path and _uri_of(path)
            if not path or not copy_uri or copy_uri in made or copy_uri in pages or not (ROOT / path).is_file():
                continue
            made[copy_uri] = content = _content(path)
            if isinstance(content, str) and path.endswith(".md"):
                waiting.append((copy_uri, content))
    return made


def rewrite(markdown: str, uri: str) -> str:
    """Point the links of a page to files outside `docs/` at their copies; leave broken ones, which MkDocs reports."""

    def new(match: re.Match[str]) -> str:
        path = _outside(match["target"], uri)
        if not path or not (ROOT / path).is_file():
            return match[0]
        return posixpath.relpath(_uri_of(path), posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return _LINK.sub(new, markdown)


def _outside(target: str, uri: str) -> str | None:
    """Return the path in the repository that a link of a page means, or None for a link within the site."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    origin = _origin_of(uri)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return None if path.startswith((f"{DOCS}/", "..")) else path


def _origin_of(uri: str) -> str:
    """Return the file of the repository that a page shows."""
    if uri.startswith(RESULTS):
        return "results/" + uri.removeprefix(RESULTS)
    at_root = {copy: path for path, copy in _AT_ROOT.items()}
    return at_root.get(uri, f"{DOCS}/{uri}")


def _uri_of(path: str) -> str:
    if path in _AT_ROOT:
        return _AT_ROOT[path]
    if path.startswith("results/"):
        return RESULTS + path.removeprefix("results/")
    return f"source/{path}.md"


def _content(path: str) -> str | bytes:
    """Return a page for the site: Markdown and records as they are, other files as a listing."""
    if path.startswith("results/"):
        return (ROOT / path).read_bytes() if not path.endswith(".md") else (ROOT / path).read_text()
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    language = {"py": "python", "toml": "toml", "yml": "yaml"}.get(path.rpartition(".")[2], "text")
    fence = "`````"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language}\n{text}\n{fence}\n"
