"""The command `clean`: show, and remove, files that no run needs."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from bench.cli.commands import LOCAL
from bench.command_line import Parser, folder, one_of
from bench.errors import UserError
from bench.experiments.profiles import PROFILES, default_profile
from bench.records.leftovers import find_leftovers


def add_clean_options(parser: Parser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--profile",
        type=one_of("profile", PROFILES),
        default=default_profile(),
        metavar="P",
        help=f"profile whose results are cleaned: {', '.join(PROFILES)}",
    )
    parser.add_argument(
        "--results", type=folder, metavar="DIR", help="folder of the records (default: results/local/PROFILE)"
    )
    parser.add_argument("--yes", action="store_true", help="remove the files; without it they are only shown")
    parser.set_defaults(command=clean_results)


def clean_results(options: argparse.Namespace) -> int:
    """Print the files that no run needs, with their size in MB; with `--yes`, remove them.

    Raises:
        UserError: The folder has no records.
    """
    results = options.results or LOCAL / options.profile
    if not (results / "runs").is_dir():
        raise UserError(f"{results} has no records, because it has no folder runs; name another folder as --results.")
    found = find_leftovers(results)
    rows = [(path.relative_to(results), f"{path.stat().st_size / 1e6:.1f}", reason) for path, reason in found]
    if rows:
        print(tabulate(rows, ["file", "MB", "why"], disable_numparse=True, colalign=("left", "right", "left")))
    if options.yes:
        for leftover in found:
            leftover.path.unlink(missing_ok=True)
    outcome = "removed" if options.yes else "that no run needs" + ("; --yes removes them" if found else "")
    print(f"{len(found)} files in {results} {outcome}.")
    return 0
