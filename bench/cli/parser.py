"""Parse the command line `python -m bench` and run its commands."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from typing import Any

import malora
from bench.cli import own_tasks
from bench.cli.clean import add_clean_options
from bench.cli.commands import (
    SPEED,
    make_run,
    make_table,
    publish_records,
    score_adapter,
    write_leaderboards,
    write_report,
)
from bench.cli.engines import ENGINES
from bench.cli.exports import export_records
from bench.cli.lists import LISTS, print_list
from bench.command_line import (
    Parser,
    file_name,
    file_path,
    folder,
    number_from,
    one_of,
    positive,
    seed_number,
    short,
    storage_url,
)
from bench.errors import UserError
from bench.experiments.profiles import PROFILES, default_profile
from bench.experiments.registry import EXPERIMENTS, Experiment
from bench.records.leftovers import is_disk_full
from bench.train.tracking import TRACKERS
from tasks import FORMATS

DESCRIPTION = "Train adapters on mixtures of tasks, score them, and write leaderboards from the records."
EXAMPLES = "python -m bench table2 --dry-run"

MAX_SEEDS = 1000  # planning takes a moment per run
MAX_LEARNING_RATE = 1e6  # far above it the optimizer's numbers exceed float32
MIN_SHARE = 0.01  # of a GPU per run; a run's CUDA context alone takes some 0.5 GB
MAX_OPTION_LENGTH = 10_000
MAX_BRACKETS = 200  # Python's JSON ends at a depth of about 1,000


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command and options; None for those of the process.

    Returns:
        The exit code: 0 if all went well, 1 if a run failed, a page is out of date or the disk is full, 2 if the user
        asked for something impossible, 130 if they interrupted it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack ± and names of the user
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries address these to developers
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        reason = " ".join(str(error).split())
        if is_disk_full(error):
            print(
                f"bench: the disk is full ({reason}); free some space, then run the same command again.",
                file=sys.stderr,
            )
            return 1
        if isinstance(error, OSError):  # a folder without permission
            print(f"bench: {reason}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue.", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """Make the parser of all commands.

    Each command sets `command`, a function of the options.
    """
    parser = Parser(prog="python -m bench", usage="%(prog)s COMMAND [options]", text=DESCRIPTION, example=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)

    def add(name: str, text: str, example: str, **options: Any) -> Parser:
        example = f"{parser.prog} {name} {example}".rstrip()
        return commands.add_parser(name, help=text, text=text, example=example, **options)

    _add_list_options(
        add("list", "List methods, tasks, mixtures or experiments by name.", "methods", usage="%(prog)s WHAT [options]")
    )
    for name, experiment in EXPERIMENTS.items():
        text = f"Train and score all rows of {experiment.title}; then write the page."
        _add_table_options(add(name, text, f"--methods {','.join(experiment.methods[-2:])} --dry-run"), experiment)
    _add_run_options(
        add("run", "Train one adapter, score it and write its record.", "--method malora --seed 0 --save adapter")
    )
    _add_score_options(
        add(
            "score",
            "Score a saved adapter on the test sets of a mixture.",
            "--adapter adapter",
            usage="%(prog)s --adapter DIR [options]",
        )
    )
    _add_leaderboard_options(
        add("leaderboard", "Write the pages in results/ and the README's tables from the records.", "--check")
    )
    report = add("report", "Write one HTML page about all published records.", "--output report.html")
    report.add_argument(
        "--output", type=file_path, metavar="FILE", help="the page's file (default: results/local/report.html)"
    )
    report.set_defaults(command=write_report)
    _add_export_options(add("export", "Write leaderboards and runs as CSV and JSON files.", "--output export"))
    own_tasks.add_export_options(
        add(
            "export-task",
            "Write a task as a folder for lm-eval.",
            "arc_easy --output lm_eval_tasks",
            usage="%(prog)s TASK [options]",
        )
    )
    _add_publish_options(add("publish", "Copy complete records of committed code to results/.", "--profile small"))
    add_clean_options(
        add("clean", "Show files that no run needs any more, such as those of killed runs.", "--profile tiny --yes")
    )
    return parser


def _add_list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=LISTS, metavar="WHAT", help=f"one of {', '.join(LISTS)}")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(command=print_list)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=folder, metavar="DIR", help="folder for the files (default: results/local/export)"
    )
    parser.add_argument(
        "--results", type=folder, metavar="DIR", help="folder of the records (default: the published ones)"
    )
    parser.set_defaults(command=export_records)


def _add_table_options(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="A,B",
        help=f"run the table rows of these methods only (default: all, {','.join(experiment.methods)}); "
        "any other method becomes a row of its own",
    )
    parser.add_argument(
        "--seeds", type=_seeds, metavar="K", help="runs per table row (default: that of the row or the profile)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="tune the learning rates first, over those of the profile; without it the published choice is used. The "
        "small profile begins with three rates and goes on next to the best one, by validation loss on seed 99",
    )
    parser.add_argument(
        "--only-sweep",
        action="store_true",
        help="tune the learning rates as --sweep does, print them and make no table",
    )
    parser.add_argument(
        "--floors",
        action="store_true",
        help="score the base and train a LoRA on each task alone, on the seed of sweeps, and print which tasks are "
        "learned; make no table",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="J",
        help="runs at a time (default: 1 on a GPU, else 1 per CPU core; with Ray 1 per place of the cluster)",
    )
    parser.add_argument(
        "--engine",
        type=one_of("engine", ENGINES),
        default=ENGINES[0],
        metavar="E",
        help="what makes the runs: local for processes of this machine; ray for the Ray cluster of RAY_ADDRESS, or "
        "without that variable Ray on this machine",
    )
    parser.add_argument(
        "--gpus-per-run",
        type=number_from(MIN_SHARE, 1),
        metavar="F",
        help="with --engine ray: share of a GPU that a run takes, such as 0.25 for four runs per GPU (default: 1)",
    )
    parser.add_argument(
        "--storage",
        type=storage_url,
        metavar="URL",
        help="with --engine ray: folder that all machines reach, such as s3://bucket/results, for records, checkpoints "
        "and claims; --results is then this machine's copy of the records (default: --results, which all mount)",
    )
    parser.add_argument(
        "--together",
        type=positive,
        default=1,
        metavar="K",
        help="train up to K runs in the same forward passes, each with its own adapter, batches and learning rate; "
        "fewer if memory is short",
    )
    _add_making(parser)
    parser.set_defaults(command=make_table, experiment=experiment)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--method", type=_method, default="malora", metavar="M", help=f"method to train: {', '.join(malora.METHODS)}"
    )
    own_tasks.add_mixture_options(
        parser,
        "tasks to train on together, or one of them by itself, as in inter/code; "
        "the tiny profile trains on generated tasks instead",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        metavar="S",
        help="seed of initialisation, order of the examples and dropout",
    )
    parser.add_argument(
        "--learning-rate",
        type=number_from(0, MAX_LEARNING_RATE, above=True),
        metavar="R",
        help="(default: the paper's)",
    )
    parser.add_argument(
        "--set",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method's config, with a value in JSON; may be repeated: "
        "beta=2, backend=dispatch, 'freeze=[\"router\"]'",
    )
    parser.add_argument("--save", type=file_path, metavar="DIR", help="save the trained adapter in this folder")
    _add_making(parser)
    parser.set_defaults(command=make_run)


def _add_making(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that trains."""
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the data (default: the profile's)")
    parser.add_argument(
        "--warmup-ratio",
        type=number_from(0, 1),
        metavar="X",
        help="share of the steps in which the learning rate rises (default: the profile's, 0.1)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the missing runs with an estimate of their time, and make none"
    )
    parser.add_argument(
        "--track",
        type=_trackers,
        default=(),
        metavar="A,B",
        help=f"log losses and scores to {', '.join(TRACKERS)}, in the folder tracking of --results",
    )


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--adapter", type=file_path, required=True, metavar="DIR", help="folder that PEFT's save_pretrained wrote"
    )
    own_tasks.add_mixture_options(parser, "mixture whose test sets are used")
    parser.add_argument(
        "--record",
        action="store_true",
        help="record the scores, so that the adapter has a row in Table 2, marked as trained elsewhere",
    )
    parser.set_defaults(command=score_adapter)


def _add_leaderboard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if a page does not agree with the records"
    )
    parser.set_defaults(command=write_leaderboards)


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=one_of("profile", (*PROFILES, SPEED)),
        default=default_profile(),
        metavar="P",
        help=f"profile whose records are published: {', '.join(PROFILES)}; {SPEED} for records of bench.speed",
    )
    parser.add_argument(
        "--results", type=folder, metavar="DIR", help="folder of the records (default: results/local/PROFILE)"
    )
    parser.add_argument(
        "--trials",
        action="store_true",
        help="publish the runs that --max-steps or --max-items cut short, in results/trials/PROFILE: estimates of time "
        "use them, and no table",
    )
    parser.set_defaults(command=publish_records)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that trains or scores."""
    parser.add_argument(
        "--profile",
        type=one_of("profile", PROFILES),
        default=default_profile(),
        metavar="P",
        help=f"size of the experiment: {', '.join(PROFILES)}",
    )
    parser.add_argument(
        "--data",
        type=file_path,
        metavar="DIR",
        help="folder of *.jsonl.gz files (default: generated for tiny, else from the Hugging Face hub)",
    )
    parser.add_argument(
        "--model",
        type=file_name,
        metavar="M",
        help="base model: built-in name, folder or hub id (default: the profile's)",
    )
    parser.add_argument(
        "--format",
        type=one_of("format", FORMATS),
        metavar="F",
        help=f"prompt format: {', '.join(FORMATS)} (default: the profile's)",
    )
    parser.add_argument(
        "--results", type=folder, metavar="DIR", help="folder for records (default: results/local/PROFILE)"
    )
    parser.add_argument(
        "--max-steps",
        type=positive,
        metavar="N",
        help="stop training after N steps, to try something out; marked in the record",
    )
    parser.add_argument(
        "--max-items", type=positive, metavar="N", help="score N items per task only, to try something out"
    )
    parser.add_argument(
        "--unsafe-code", action="store_true", help="run generated programs (HumanEval) without a sandbox"
    )


_method = one_of("method", malora.METHODS)
_tracker = one_of("tracker", TRACKERS)


def _methods(value: str) -> list[str]:
    return [_method(name) for name in value.split(",")]


def _trackers(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_tracker(name) for name in value.split(",")))


def _seeds(value: str) -> int:
    if (number := positive(value)) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{number} runs per row are more than {MAX_SEEDS}")
    return number


def _option(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; a value that is not JSON is a string."""
    option, equals, value = text.partition("=")
    if not (option and equals):
        raise argparse.ArgumentTypeError(f"{short(text)} is not NAME=VALUE")
    if len(value) > MAX_OPTION_LENGTH or value.count("[") + value.count("{") > MAX_BRACKETS:
        raise argparse.ArgumentTypeError(f"{short(text)} is too long, or nested too deeply")
    try:
        value.encode()
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{short(text)} has half of a surrogate pair, which is no character") from None
    except ValueError:
        return option, value
    return option, parsed
