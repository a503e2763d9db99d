"""Run cells of the grid: choose learning rates, train all students for all seeds, write a record for each cell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.experiments.profiles import GRID, PROFILES, TUNING_SEED
from bench.records import teacher_cells as records
from bench.records.provenance import provenance
from bench.records.teacher_cells import StudentResult, TeacherCell, TeacherRates
from bench.runs.sweep import next_rates
from bench.teachers.generator import (
    TEST,
    TRAINING,
    VALIDATION,
    Samples,
    Shape,
    Teacher,
    draw_samples,
    make_teacher,
    predicted_crossover,
)
from bench.teachers.oracle import check_cosines, check_teacher
from bench.teachers.students import STUDENTS
from bench.teachers.training import Members, SeedData, TrainingSettings, errors, train

TUNING_RHO = 0.5  # of both dials
FIRST_RATES = PROFILES["small"].first_rates


@dataclass(frozen=True)
class Grid:
    """Cells to run; the defaults are those of the protocol.

    Attributes:
        tasks: Numbers of tasks, T.
        samples: Numbers of samples per task, N.
        rhos_down: Values of the down projections' dial.
        rhos_up: Values of the up projections' dial.
    """

    tasks: Sequence[int] = (2, 4, 8, 16)
    samples: Sequence[int] = (256, 512, 1024, 2048, 4096)
    rhos_down: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rhos_up: Sequence[float] = rhos_down


@dataclass(frozen=True)
class CellSettings:
    """What all cells of a folder have in common.

    Attributes:
        sizes: Fields of `Shape` besides the number of tasks, where they differ from its defaults.
        training: How students are trained.
        fresh: Fresh inputs per task, for validation and test each.
        seeds: Seeds of every cell.
        students: Names in `STUDENTS`.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    fresh: int = 512
    seeds: Sequence[int] = tuple(range(10))
    students: Sequence[str] = tuple(STUDENTS)

    def shape(self, tasks: int) -> Shape:
        """Return the sizes for a number of tasks."""
        return Shape(tasks=tasks, **self.sizes)

    def to_json(self) -> dict[str, Any]:
        """Return the values that a record holds."""
        sizes = {name: value for name, value in asdict(self.shape(1)).items() if name != "tasks"}
        return {
            **sizes,
            **asdict(self.training),
            "fresh": self.fresh,
            "seeds": list(self.seeds),
            "students": [*self.students],
        }


def choose_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate that the protocol's search would choose, given the losses of all rates.

    Members train together, so all rates cost little more than some. The search still decides, as for other tables.

    Args:
        losses: Validation loss by rate; infinite for a diverged run.
    """
    tried: dict[float, float] = {}
    while more := next_rates(tried, GRID, FIRST_RATES):
        tried |= {rate: losses[rate] for rate in more}
    return min(sorted(tried), key=tried.__getitem__)


def tune(settings: CellSettings, tasks: int, samples: int, device: torch.device) -> TeacherRates:
    """Choose each student's rate on seed 99 with both dials at 0.5, by the error on validation inputs."""
    teacher = make_teacher(settings.shape(tasks), TUNING_RHO, TUNING_RHO, TUNING_SEED)
    members = Members([teacher] * len(GRID), [0] * len(GRID), device)
    data, fresh = (
        SeedData.draw([teacher], count, [TUNING_SEED], stream, device)
        for count, stream in ((samples, TRAINING), (settings.fresh, VALIDATION))
    )
    losses = {}
    for name in settings.students:
        weights = train(STUDENTS[name], members, data, [TUNING_SEED], GRID, settings.training)
        losses[name] = dict(zip(GRID, _finite(errors(STUDENTS[name], weights, members, fresh)), strict=True))
    return TeacherRates(
        settings=settings.to_json(),
        tasks=tasks,
        samples=samples,
        losses={name: {f"{rate:g}": _or_none(loss) for rate, loss in found.items()} for name, found in losses.items()},
        chosen={name: choose_rate(found) for name, found in losses.items()},
        provenance=provenance(device, jobs=1),
    )


Dials = tuple[float, float]  # rho_down, rho_up


def run_cells(
    settings: CellSettings,
    tasks: int,
    samples: int,
    dials: Sequence[Dials],
    rates: Mapping[str, float],
    device: torch.device,
) -> list[TeacherCell]:
    """Train all students of some cells that differ in their dials only, each method's in one loop.

    Args:
        settings: Settings of all cells.
        tasks: T.
        samples: N.
        dials: Both dials of each cell.
        rates: Learning rate by student.
        device: Where to train.

    Raises:
        UserError: A teacher fails a check; then nothing is trained.
    """
    shape, seeds = settings.shape(tasks), settings.seeds
    teachers = [[make_teacher(shape, down, up, seed) for seed in seeds] for down, up in dials]
    by_seed = [draw_samples(teacher, samples, seed) for teacher, seed in zip(teachers[0], seeds, strict=True)]
    checks = [_check(of_cell, by_seed[0]) for of_cell in teachers]
    members = Members(
        [teacher for of_cell in teachers for teacher in of_cell], list(range(len(seeds))) * len(dials), device
    )
    data = SeedData(by_seed, device)
    del by_seed  # a copy of the data, which may have gigabytes
    fresh = SeedData.draw(teachers[0], settings.fresh, seeds, TEST, device)
    results: list[dict[str, StudentResult]] = [{} for _ in dials]
    for name, rate in rates.items():
        began = time.perf_counter()
        weights = train(STUDENTS[name], members, data, seeds, [rate] * len(teachers) * len(seeds), settings.training)
        found = _finite(errors(STUDENTS[name], weights, members, fresh))  # waits for the device
        seconds = (time.perf_counter() - began) / len(dials)
        for i, of_cell in enumerate(results):
            of_seeds = [_or_none(error) for error in found[i * len(seeds) : (i + 1) * len(seeds)]]
            of_cell[name] = StudentResult(learning_rate=rate, errors=of_seeds, train_seconds=seconds)
    return [
        TeacherCell(
            settings=settings.to_json(),
            tasks=tasks,
            samples=samples,
            rho_down=down,
            rho_up=up,
            seeds=list(seeds),
            predicted_crossover=predicted_crossover(shape, samples),
            checks=check,
            students=students,
            provenance=provenance(device, jobs=1),
        )
        for (down, up), check, students in zip(dials, checks, results, strict=True)
    ]


def run_grid(
    settings: CellSettings,
    grid: Grid,
    folder: Path,
    device: torch.device,
    together: int = 1,
    say: Callable[[str], None] = print,
) -> int:
    """Run the cells of a grid that have no record yet, and return their number.

    Args:
        settings: Settings of all cells.
        grid: The cells.
        folder: Folder of the records.
        device: Where to train.
        together: Cells that train in one loop. They share the data, so memory grows by weights and features only.
        say: Called with a line of progress after each record.

    Raises:
        UserError: A record in the folder is of other settings, or a teacher fails a check.
    """
    done, wanted = 0, settings.to_json()
    for tasks, samples in ((T, N) for T in grid.tasks for N in grid.samples):
        paths = {
            (down, up): records.cell_path(folder, tasks, samples, down, up)
            for up, down in product(grid.rhos_up, grid.rhos_down)
        }
        missing = [dials for dials, path in paths.items() if records.read(path, TeacherCell, wanted) is None]
        if not missing:
            continue
        path = records.rates_path(folder, tasks, samples)
        rates = records.read(path, TeacherRates, wanted)
        if rates is None:
            rates = tune(settings, tasks, samples, device)
            records.write(path, rates)
            say(f"{path.name}: {', '.join(f'{name} {rate:g}' for name, rate in rates.chosen.items())}")
        chosen = {name: float(rate) for name, rate in rates.chosen.items()}
        for first in range(0, len(missing), together):
            for cell in run_cells(settings, tasks, samples, missing[first : first + together], chosen, device):
                path = records.cell_path(folder, tasks, samples, float(cell.rho_down), float(cell.rho_up))
                records.write(path, cell)
                seconds = sum(float(result.train_seconds) for result in cell.students.values())
                say(f"{path.name}: {seconds:.1f} s")
                done += 1
    return done


def _check(teachers: Sequence[Teacher], samples: Samples) -> dict[str, float]:
    """Check the cosines of every seed's teacher, and solve in closed form for the first seed, which takes longer."""
    return check_teacher(teachers[0], samples) | {"cosine_error": max(map(check_cosines, teachers))}


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.inf for value in values]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
