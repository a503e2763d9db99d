"""Parsers of the command line `python -m bench`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import malora
from bench.cli.commands import (
    SPEED,
    make_run,
    make_table,
    publish_records,
    score_adapter,
    write_leaderboards,
    write_report,
)
from bench.command_line import Help, folder, one_of, positive
from bench.errors import UserError
from bench.experiments.profiles import PROFILES, default_profile
from bench.experiments.registry import EXPERIMENTS
from tasks import FORMATS, MIXTURES


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to their developers
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on.", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, experiment in EXPERIMENTS.items():
        table = commands.add_parser(name, help=f"{experiment.title}: train, score, lay out", formatter_class=Help)
        _add_setting(table)
        table.add_argument(
            "--methods",
            type=_methods,
            metavar="A,B",
            help=f"rows of these methods, by commas (default: all, of {', '.join(experiment.methods)})",
        )
        table.add_argument(
            "--seeds", type=positive, metavar="K", help="runs a row (default: the profile's, or the row's)"
        )
        table.add_argument(
            "--sweep",
            action="store_true",
            help="first try each of the profile's rates for each method; without it the published choice counts",
        )
        table.add_argument(
            "--jobs", type=positive, metavar="J", help="runs at a time (default: one a core, or one on a GPU)"
        )
        table.set_defaults(command=make_table, experiment=experiment)

    one = commands.add_parser("run", help="one run: train, score, record", formatter_class=Help)
    _add_setting(one)
    one.add_argument("--method", type=_method, default="malora", metavar="M", help="what to train")
    one.add_argument(
        "--mixture",
        type=one_of("mixture", MIXTURES),
        default="intra",
        metavar="NAME",
        help="tasks to train together, or one part of them alone, as in inter/code; the tiny profile has stand-ins",
    )
    one.add_argument("--seed", type=int, default=0, metavar="S", help="of initialisation, order and dropout")
    one.add_argument("--learning-rate", type=_rate, metavar="R", help="(default: the paper's)")
    one.add_argument(
        "--set",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method's config, its value in JSON: beta=2, backend=dispatch, 'freeze=[\"router\"]'",
    )
    one.add_argument("--save", type=Path, metavar="DIR", help="keep the trained adapter there")
    one.set_defaults(command=make_run)

    scored = commands.add_parser("score", help="score a saved adapter on a mixture's tests", formatter_class=Help)
    _add_setting(scored)
    scored.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="what save_pretrained wrote")
    scored.add_argument(
        "--mixture", type=one_of("mixture", MIXTURES), default="intra", metavar="NAME", help="whose tests"
    )
    scored.set_defaults(command=score_adapter)

    board = commands.add_parser(
        "leaderboard", help="write results/**/*.md and the README's table from records", formatter_class=Help
    )
    board.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file is not what the records give"
    )
    board.set_defaults(command=write_leaderboards)

    page = commands.add_parser("report", help="write one HTML page of all published records", formatter_class=Help)
    page.add_argument(
        "--output", type=Path, metavar="FILE", help="the page's file (default: results/local/report.html)"
    )
    page.set_defaults(command=write_report)

    publish = commands.add_parser("publish", help="copy clean, whole records to results/PROFILE", formatter_class=Help)
    publish.add_argument(
        "--profile",
        type=one_of("profile", (*PROFILES, SPEED)),
        default=default_profile(),
        metavar="P",
        help=f"whose; {SPEED} for those of bench.speed",
    )
    publish.add_argument("--results", type=folder, metavar="DIR", help="where from (default: results/local/PROFILE)")
    publish.set_defaults(command=publish_records)
    return parser


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=one_of("profile", PROFILES),
        default=default_profile(),
        metavar="P",
        help=f"size of the experiment: {', '.join(PROFILES)}",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of *.jsonl.gz (default: the profile's: generated for tiny, else the Hugging Face hub)",
    )
    parser.add_argument("--model", metavar="M", help="built-in name, folder or hub id (default: the profile's)")
    parser.add_argument(
        "--format",
        type=one_of("format", FORMATS),
        metavar="F",
        help=f"how questions are put: {', '.join(FORMATS)} (default: the profile's)",
    )
    parser.add_argument("--results", type=folder, metavar="DIR", help="for records (default: results/local/PROFILE)")
    parser.add_argument("--max-steps", type=positive, metavar="N", help="stop training early, to try things out")
    parser.add_argument("--max-items", type=positive, metavar="N", help="score so many items a task, to try things out")
    parser.add_argument(
        "--unsafe-code", action="store_true", help="run what models write (HumanEval) on purpose without a sandbox"
    )


_method = one_of("method", malora.METHODS)


def _methods(value: str) -> list[str]:
    return [_method(name) for name in value.split(",")]


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} must be a number above 0")
    return rate


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word is a string
