"""Compare a fresh measurement with the committed figures, and say what has moved.

python -m bench.regress                       # what `make regress` runs
python -m bench.regress --only training       # one part
python -m bench.regress --update              # write the committed figures again

The exit code is 1 if something has moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

import torch

from bench.command_line import Parser, file_path, one_of
from bench.errors import UserError
from bench.records import store
from bench.records.provenance import provenance
from bench.records.regressions import (
    PATH,
    Regressions,
    Value,
    differences,
    read_regressions,
    this_machine,
    write_regressions,
)
from bench.regress.bounds import measure_bounds, measure_in_process
from bench.regress.costs import measure_imports, measure_layers
from bench.regress.figures import Comparison, Figures, compare
from bench.regress.speed import compare_speed
from bench.regress.suite import REPORT, compare_suite
from bench.regress.training import measure_data, measure_training

# By the beginning of their figures' names. These are measured on a CPU, also where there is a GPU.
MEASURED: dict[str, Callable[[], Figures]] = {
    "data": measure_data,
    "training": measure_training,
    "imports": measure_imports,
    "layer": measure_layers,
}
PARTS = (*MEASURED, "suite", "speed")


def main(arguments: list[str] | None = None) -> int:
    """Compare or update, and return the exit code: 0, 1 if a figure has moved, 2 for what cannot be done."""
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the developers of our dependencies
    try:
        if options.json:
            print(json.dumps({name: figure.value for name, figure in _measure_here(options.only or PARTS).items()}))
            return 0
        return _update(options) if options.update else _compare(options)
    except UserError as error:
        print(f"bench.regress: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written.", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """Return the parser of the command line."""
    text, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(prog="python -m bench.regress", text=text, example=examples.partition("\n\n")[0])
    parser.add_argument("--only", type=_parts, metavar="A,B", help=f"parts: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--figures", type=file_path, default=PATH, metavar="FILE", help="file of the committed figures")
    parser.add_argument("--json", action="store_true", help="print the measured figures as JSON, and compare nothing")
    parser.add_argument(
        "--update", action="store_true", help="write the committed figures again, after a change that was meant to move"
    )
    return parser


_part = one_of("part", PARTS)


def _parts(value: str) -> tuple[str, ...]:
    return tuple(map(_part, value.split(",")))


def _measure_here(parts: tuple[str, ...]) -> Figures:
    """Measure in this process, which must see no GPU."""
    found: Figures = {}
    for name in parts:
        if name in MEASURED:
            found |= MEASURED[name]()
    return found


def _compare(options: argparse.Namespace) -> int:
    committed = read_regressions(options.figures)
    made_by = provenance(torch.device("cpu"), jobs=1)
    other = differences(committed.machine, this_machine(made_by.packages))
    comparisons: list[Comparison] = []
    remarks: list[str] = []
    chosen = options.only or PARTS
    if parts := tuple(name for name in MEASURED if name in chosen):
        comparisons += compare(committed, _measure(parts), parts, is_same=not other)
    if "suite" in chosen:
        found, remark = compare_suite(REPORT, is_same=not other)
        comparisons, remarks = comparisons + found, [*remarks, remark]
    if "speed" in chosen:
        if torch.cuda.is_available():
            found, remark = compare_speed(store.read_speed(store.RESULTS / "speed"))
        else:
            found, remark = [], "speed: not compared, because there is no GPU"
        comparisons, remarks = comparisons + found, [*remarks, remark]
    print(report(committed, comparisons, other, remarks))
    return int(any(one.has_moved for one in comparisons))


def _measure(parts: tuple[str, ...]) -> dict[str, Value]:
    """Measure on the CPU: in this process, or in one that sees no GPU."""
    if torch.cuda.is_available():
        return measure_in_process(parts, {"CUDA_VISIBLE_DEVICES": ""})
    return {name: figure.value for name, figure in _measure_here(parts).items()}


def report(committed: Regressions, comparisons: list[Comparison], other: list[str], remarks: list[str]) -> str:
    """Return the report for people.

    Args:
        committed: The committed figures.
        comparisons: Everything that was compared.
        other: What differs between this machine and that of the committed figures.
        remarks: More lines to print.
    """
    made_by, moved = committed.provenance, [one for one in comparisons if one.has_moved]
    commit = (made_by.commit or "an unknown commit")[:12]
    lines = [f"committed figures: of {commit}, {made_by.time[:10]}, {committed.machine.processor}"]
    if other:
        lines.append(f"compared within bounds, because this machine differs: {'; '.join(other)}")
    else:
        lines.append("compared to the digit: the processor and the versions are the same")
    lines += [*remarks, *(one.text() for one in moved)]
    if not moved:
        return "\n".join([*lines, f"nothing has moved: {len(comparisons)} figures are within their bounds"])
    lines += [
        f"{len(moved)} of {len(comparisons)} figures have moved; git diff {commit} -- malora tasks bench",
        "if they were meant to: commit the change, run `make regress ARGS=--update`, and commit the figures",
    ]
    return "\n".join(lines)


def _update(options: argparse.Namespace) -> int:
    if options.only:
        raise UserError("--update measures all parts, so that all figures are of one commit; leave --only out.")
    if torch.cuda.is_available():
        raise UserError("--update measures on a CPU; set CUDA_VISIBLE_DEVICES= to hide the GPU.")
    made_by = provenance(torch.device("cpu"), jobs=1)
    if made_by.commit is None or made_by.dirty:
        raise UserError(
            "the sources differ from the last commit, and figures name the commit they are of; commit first."
        )
    measured = _measure_here(PARTS)
    if failed := [name for name, figure in measured.items() if name.endswith(".status") and figure.value != "ok"]:
        raise UserError(f"{', '.join(failed)}: a run failed, so there are no figures to write; its error is above.")
    found = Regressions(
        schema=1,
        provenance=made_by,
        machine=this_machine(made_by.packages),
        base_hash=str(measured["training.base"].value),
        figures=measure_bounds(measured),
    )
    write_regressions(found, options.figures)
    print(f"{len(found.figures)} figures written to {options.figures}")
    return 0
