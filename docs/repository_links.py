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
SOURCES = "source/"


def linked_pages(pages: dict[str, str]) -> dict[str, str | bytes]:
    """Return the copies of all files outside `docs/` that these pages link to.

    The files that those link to in turn are included.
    """
    made: dict[str, str | bytes] = {}
    waiting = list(pages.items())
    while waiting:
        uri, text = waiting.pop()
        for match in _LINK.finditer(text):
            path = _target(match["target"], uri)
            if path is None or path.startswith(f"{DOCS}/") or _uri_of(path) in made or _uri_of(path) in pages:
                continue
            made[_uri_of(path)] = content = _content(path)
            if isinstance(content, str) and path.endswith(".md"):
                waiting.append((_uri_of(path), content))
    return made


def rewrite(markdown: str, uri: str) -> str:
    """Point the links of a page to files of the repository at their pages.

    Broken links are left as they are, and MkDocs reports them.
    """

    def new(match: re.Match[str]) -> str:
        path = _target(match["target"], uri)
        if path is None:
            return match[0]
        return posixpath.relpath(_uri_of(path), posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return _LINK.sub(new, markdown)


def _target(target: str, uri: str) -> str | None:
    """Return the repository file that a page's link means, or None if there is none."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_origin_of(uri)), target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _origin_of(uri: str) -> str:
    """Return the file of the repository that a page shows."""
    if uri.startswith(RESULTS):
        return "results/" + uri.removeprefix(RESULTS)
    if uri.startswith(SOURCES):
        return uri.removeprefix(SOURCES).removesuffix(".md")
    at_root = {copy: path for path, copy in _AT_ROOT.items()}
    return at_root.get(uri, f"{DOCS}/{uri}")


def _uri_of(path: str) -> str:
    """Return the address in the site of a file of the repository."""
    if path in _AT_ROOT:
        return _AT_ROOT[path]
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    if path.startswith("results/"):
        return RESULTS + path.removeprefix("results/")
    return f"{SOURCES}{path}.md"


def _content(path: str) -> str | bytes:
    """Return a page for the site.

    Markdown and records stay as they are, and other files become a listing.
    """
    if path.startswith("results/"):
        return (ROOT / path).read_bytes() if not path.endswith(".md") else (ROOT / path).read_text(encoding="utf-8")
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = {"py": "python", "toml": "toml", "yml": "yaml"}.get(path.rpartition(".")[2], "text")
    fence = "`````"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language}\n{text}\n{fence}\n"
