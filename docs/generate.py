"""Pages of the site that are made from code and records.

These are result tables, the HTML report and the command lines.

Nothing is caught here: without an extra that a page needs, the build fails and names it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.command_line import Parser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmark/results"


def generated_pages() -> dict[str, str | bytes]:
    """Return every generated page by its address in the site's sources."""
    return {
        **_result_pages(),
        "benchmark/report.html": _report(),
        "reference/command-line.md": _command_lines(),
    }


def _result_pages() -> dict[str, str | bytes]:
    """Return the generated tables and figures under `results/`, without local runs."""
    pages: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "results").rglob("*")):
        name = path.relative_to(ROOT / "results").as_posix()
        if path.suffix not in (".md", ".svg") or name.startswith("local/"):
            continue
        pages[f"{RESULTS}/{name}"] = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
    return pages


def _report() -> str:
    """Return the HTML report of all published records: one file that needs no network."""
    from bench.experiments.profiles import PROFILES
    from bench.records import store
    from bench.report.claims import claims
    from bench.report.html import page

    records = {name: store.read_all(store.RESULTS / name) for name in PROFILES}
    speeds = store.read_speed(store.RESULTS / "speed")
    return str(page(records, speeds, claims(records, speeds)))


def _command_lines() -> str:
    """Return the reference of all command lines, from their parsers."""
    from bench.cli.parser import make_parser
    from bench.regress import cli as regress_cli
    from bench.speed import cli as speed_cli
    from bench.teachers import cli as teachers_cli

    bench = make_parser()
    lines = [
        "# Command line",
        "This page is generated from the argument parsers. A default that depends on the machine is the default of a "
        "machine without a GPU.",
        f"## {bench.prog}",
        bench.text,
        _example(bench),
        "An error of the user ends a command with exit code 2 and one line that says what to change.",
    ]
    for action in bench._actions:
        if isinstance(action, argparse._SubParsersAction):
            for parser in action.choices.values():
                lines += [f"### {parser.prog}", parser.text, _example(parser), _options(parser)]
    for other in (speed_cli.make_parser(), regress_cli.make_parser(), teachers_cli.make_parser()):
        lines += [f"## {other.prog}", other.text, _example(other), _options(other)]
        for action in other._actions:
            if isinstance(action, argparse._SubParsersAction):
                lines += [
                    f"### {parser.prog}\n\n{parser.text}\n\n{_options(parser)}" for parser in action.choices.values()
                ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _example(parser: Parser) -> str:
    return f"```bash\n{parser.example}\n```"


def _options(parser: argparse.ArgumentParser) -> str:
    """Return a table of a parser's options."""
    formatter = parser._get_formatter()
    body = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        metavar = action.metavar if action.metavar and action.nargs != 0 else ""
        names = " ".join(filter(None, [", ".join(action.option_strings), str(metavar)]))
        text = formatter._expand_help(action) if action.help else ""
        required = " (required)" if action.required else ""
        body.append(f"| `{names}` | {_cell(text)}{required} |")
    return "\n".join(["| option | meaning |", "| --- | --- |", *body]) if body else "It takes no options."


def _cell(text: str) -> str:
    """Return a help text as the cell of a Markdown table.

    The paths in it are those of this checkout.
    """
    return text.replace(f"{ROOT}/", "").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
