"""Train students of teachers whose tasks are alike to a known degree, and map which method is better.

python -m bench.teachers run --tasks 2 --samples 256    # part of the grid; records that exist are kept
python -m bench.teachers run --device cuda --together 25
python -m bench.teachers report                         # the map, as Markdown

Records are one JSON file per cell, below results/local/teachers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from bench.command_line import MAX_COUNT, Parser, folder, number_from, one_of, positive, require_folder, short
from bench.errors import UserError, unknown_name
from bench.experiments.profiles import TUNING_SEED
from bench.records.teacher_cells import FOLDER, read_cells
from bench.report.teachers import report
from bench.teachers.cells import CellSettings, Grid, run_grid
from bench.teachers.generator import Shape
from bench.teachers.students import STUDENTS
from bench.teachers.training import TrainingSettings

_share = number_from(0, 1)
_norm = number_from(0, 1000)  # float32 inputs keep three digits of their unit variance
_student = one_of("student", STUDENTS)


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit code: 0, or 2 for what cannot be done."""
    options = make_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"bench.teachers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the cells that are complete have records.", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """Return the parser of the command line."""
    text, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(prog="python -m bench.teachers", text=text, example=examples.partition("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)
    run = commands.add_parser("run", help="train the cells that have no record yet", text="Train cells of the grid.")
    run.set_defaults(run=_run)
    shape, training, grid, cells = Shape(tasks=2), TrainingSettings(), Grid(), CellSettings()
    run.add_argument("--tasks", type=_some(positive), default=grid.tasks, metavar="T,...", help="numbers of tasks")
    run.add_argument("--samples", type=_some(positive), default=grid.samples, metavar="N,...", help="samples per task")
    run.add_argument(
        "--rho", type=_some(_share), default=grid.rhos_down, metavar="RHO,...", help="cosines between down projections"
    )
    run.add_argument(
        "--rho-up", type=_some(_share), default=grid.rhos_up, metavar="RHO,...", help="cosines between up projections"
    )
    run.add_argument("--seeds", type=_some(_seed), default=cells.seeds, metavar="SEED,...", help="seeds")
    run.add_argument("--students", type=_some(_student), default=cells.students, metavar="A,B", help="methods")
    run.add_argument("--explained", type=_share, default=shape.explained, help="teacher's share of the variance")
    run.add_argument("--separation", type=_norm, default=shape.separation, help="norm of each task's mean input")
    run.add_argument("--steps", type=positive, default=training.steps, help="optimizer steps")
    run.add_argument("--batch", type=positive, default=training.batch, help="samples per batch")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    run.add_argument("--together", type=positive, default=1, metavar="CELLS", help="cells that train in one loop")
    run.add_argument("--out", type=folder, default=FOLDER, metavar="FOLDER", help="folder of the records")
    show = commands.add_parser("report", help="print the map as Markdown", text="Print which method is better where.")
    show.set_defaults(run=_report)
    show.add_argument("--out", type=folder, default=FOLDER, metavar="FOLDER", help="folder of the records")
    show.add_argument("--first", type=_student, default="molora", help="method to compare with")
    show.add_argument("--second", type=_student, default="malora-d32", help="method that is compared")
    return parser


def _some(kind: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """Return an argument type for different values with commas between them."""

    def parse(value: str) -> tuple[object, ...]:
        values = tuple(kind(one) for one in value.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{short(value)} has a value twice; give each once")
        return values

    return parse


def _seed(value: str) -> int:
    seed = int(value) if value.isdecimal() and len(value) <= len(str(MAX_COUNT)) else -1
    if not 0 <= seed <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{short(value)} is not a whole number from 0 to {MAX_COUNT:,}")
    if seed == TUNING_SEED:
        raise argparse.ArgumentTypeError(
            f"{seed} is the seed of the learning rates, which is not reported; take another"
        )
    return seed


def _run(options: argparse.Namespace) -> int:
    require_folder("--out", options.out)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use; leave it out.")
    settings = CellSettings(
        sizes={"explained": options.explained, "separation": options.separation},
        training=TrainingSettings(steps=options.steps, batch=options.batch),
        seeds=options.seeds,
        students=options.students,
    )
    for tasks in options.tasks:
        settings.shape(tasks)  # refuses what cannot be made before anything is trained
    grid = Grid(options.tasks, options.samples, options.rho, options.rho_up)
    done = run_grid(settings, grid, options.out, torch.device(options.device), options.together)
    print(f"cells written to {options.out}: {done}")
    return 0


def _report(options: argparse.Namespace) -> int:
    cells = read_cells(options.out)
    for name in (options.first, options.second):
        if name not in cells[0].students:
            raise UserError(f"{options.out}: {unknown_name('student', name, cells[0].students)}")
    print(report(cells, options.first, options.second))
    return 0
