"""MkDocs events: generate pages, follow links out of `docs/`, and check the words.

MkDocs calls the functions named `on_*`. A warning fails the build, because it is strict.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import generate  # MkDocs puts the folder of a hook on the path while it loads the hook
import plain_english
import repository_links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

logger = get_plugin_logger(__name__)


def on_startup(**_: Any) -> None:
    """Import this checkout's packages, whatever is installed."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from records, parsers and files outside `docs/`."""
    pages = generate.generated_pages()
    linked = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked |= {uri: text for uri, text in pages.items() if isinstance(text, str) and uri.endswith(".md")}
    pages |= repository_links.linked_pages(linked)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to repository files at their copies in the site; check the words."""
    uri = page.file.src_uri
    if plain_english.applies_to(uri):
        for problem in plain_english.problems(markdown):
            logger.warning("%s: %s", uri, problem)
    return repository_links.rewrite(markdown, uri)


def on_pre_build(config: MkDocsConfig, **_: Any) -> None:
    """Check the README, which is not part of the site."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for problem in [*plain_english.problems(readme), *plain_english.readme_problems(readme)]:
        logger.warning("README.md: %s", problem)
