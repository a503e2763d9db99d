"""Check prose for words that this project does not use.

The lists hold words with a private meaning in earlier versions, and the term to use instead. Code, links, tables that
are generated, and `notes/` are exempt. Run `python docs/plain_english.py FILE ...` to check single files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# A word, as a regular expression, and what to write instead.
INSTEAD = {
    r"rooms?": "package, or padded columns",
    r"lanes?": "CUDA stream",
    r"beside": "next to, or the name of the operation",
    r"siblings?": "projection group",
    r"neighbours?": "un-adapted linear layer",
    r"rivals?": "baseline",
    r"held weights": "cached weights",
    r"as it comes": "out of the box",
    r"(?:down|up) sides?": "down projection, up projection",
    r"so many": "a number",
    r"who(?:ever)? (?:trains|takes|makes|wants|looks|measures)": "you, or the name of the actor",
    r"(?:tokens|launches|kernels|waits) a (?:second|step|pass)": "tokens per second",
    r"linear maps?": "linear layer",
}
MAX_WORDS = 25  # in a sentence, by rule 4 of the style
README_LINES, README_BYTES, README_LINE_LENGTH = 150, 10_000, 400
# Diaries, and text that others generate or write for the repository itself.
EXEMPT = ("notes/2", "benchmark/results/", "source/", "changelog", "contributing")
_WORDS = re.compile(rf"\b(?:{'|'.join(f'(?:{word})' for word in INSTEAD)})\b", re.IGNORECASE)


def applies_to(uri: str) -> bool:
    """Return whether a page of the site is prose by hand in today's words."""
    return not uri.startswith(EXEMPT)


def problems(markdown: str) -> list[str]:
    """List banned words and overlong sentences of a page, each with its line number."""
    found = []
    for number, line in _prose(markdown):
        for match in _WORDS.finditer(line):
            instead = next(new for old, new in INSTEAD.items() if re.fullmatch(old, match[0], re.IGNORECASE))
            found.append(f"line {number}: {match[0]!r}; write {instead}")
    paragraphs = "\n".join(line for _, line in _prose(markdown, tables=False))
    for paragraph in re.split(r"\n\s*\n|\n\s*[-\d#]", paragraphs):
        for sentence in re.split(r"(?<=[.!?:;])\s", " ".join(paragraph.split())):
            if len(sentence.split()) > MAX_WORDS:
                found.append(f"a sentence of {len(sentence.split())} words: {sentence[:60]}...")
    return found


def readme_problems(readme: str) -> list[str]:
    """List what makes a README too long to be read on its first screen."""
    lines, size = readme.splitlines(), len(readme.encode())
    found = [f"line {n}: {len(line)} characters" for n, line in enumerate(lines, 1) if len(line) > README_LINE_LENGTH]
    if len(lines) > README_LINES:
        found.append(f"{len(lines)} lines, more than {README_LINES}")
    if size > README_BYTES:
        found.append(f"{size} bytes, more than {README_BYTES}")
    return found


def _prose(markdown: str, tables: bool = True) -> list[tuple[int, str]]:
    """Return the lines with numbers, without code, link targets and generated blocks."""
    kept, in_code, in_generated = [], False, False
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
            line = ""
        if re.fullmatch(r"<!-- (?!end)\w.*-->", line):
            in_generated = True
        is_code = in_code or line.startswith("    ") or line.startswith(":::")
        if is_code or in_generated or (line.startswith("|") and not tables):
            kept.append((number, ""))
        else:
            kept.append((number, re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", line)))
        if line == "<!-- end -->":
            in_generated = False
    return kept


if __name__ == "__main__":
    failures = [
        f"{name}: {problem}" for name in sys.argv[1:] for problem in problems(Path(name).read_text(encoding="utf-8"))
    ]
    print("\n".join(failures) or "no banned word")
    sys.exit(bool(failures))
