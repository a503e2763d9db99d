"""Records of students of teachers with a dial: one file per cell, and one per choice of learning rates.

A cell is a number of tasks, a number of samples and a value of both dials. Its file is written once. Records of other
settings are not in the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from bench.errors import UserError
from bench.records.files import write_atomically
from bench.records.provenance import ROOT
from bench.records.schema import Provenance
from bench.records.section import Integer, Number, Section

FOLDER = ROOT / "results" / "local" / "teachers"


class StudentResult(Section):
    """Outcome of one method in a cell.

    Attributes:
        learning_rate: Learning rate of all its runs.
        errors: Squared error on fresh inputs by seed, relative to that of the frozen layer; None for a diverged run.
        train_seconds: Training of all seeds together.
    """

    learning_rate: Number
    errors: list[Number | None]
    train_seconds: Number


class TeacherCell(Section):
    """All students of a cell.

    Attributes:
        settings: Sizes and training; equal in all records of a folder.
        rho_down, rho_up: Principal cosines between tasks.
        predicted_crossover: ρ* of the protocol's prediction.
        checks: Error of the principal cosines, and relative errors of closed-form solutions, for the first seed.
        students: Results by name.
    """

    schema_number: Literal[1] = 1
    settings: dict[str, Any]
    tasks: Integer
    samples: Integer
    rho_down: Number
    rho_up: Number
    seeds: list[Integer]
    predicted_crossover: Number
    checks: dict[str, Number]
    students: dict[str, StudentResult]
    provenance: Provenance


class TeacherRates(Section):
    """Choice of each method's learning rate for a number of tasks and of samples.

    Attributes:
        losses: Relative validation error by method and learning rate; None for a diverged run.
        chosen: Learning rate by method.
    """

    schema_number: Literal[1] = 1
    settings: dict[str, Any]
    tasks: Integer
    samples: Integer
    losses: dict[str, dict[str, Number | None]]
    chosen: dict[str, Number]
    provenance: Provenance


Found = TypeVar("Found", TeacherCell, TeacherRates)


def cell_path(folder: Path, tasks: int, samples: int, rho_down: float, rho_up: float) -> Path:
    """Return the file of a cell."""
    return folder / f"cell-T{tasks}-N{samples}-down{rho_down:g}-up{rho_up:g}.json"


def rates_path(folder: Path, tasks: int, samples: int) -> Path:
    """Return the file of a choice of learning rates."""
    return folder / f"rates-T{tasks}-N{samples}.json"


def write(path: Path, found: TeacherCell | TeacherRates) -> None:
    """Write a record, which must not exist yet."""
    assert not path.exists(), f"{path} is written once"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found.model_dump(), indent=1) + "\n")


def read(path: Path, kind: type[Found], settings: Mapping[str, Any] | None = None) -> Found | None:
    """Read a record, or return None if there is no such file.

    Args:
        path: The file.
        kind: What it holds.
        settings: Settings that it must have; None for any.

    Raises:
        UserError: The file is broken, or is of other settings.
    """
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a record of teachers ({reason}); remove it, and run the cell again.") from error
    if settings is not None and found.settings != dict(settings):
        raise UserError(
            f"{path} is of other settings ({_difference(found.settings, settings)}); name another "
            "folder with --out, or remove it."
        )
    return found


def read_cells(folder: Path) -> list[TeacherCell]:
    """Read all cells of a folder, sorted by tasks, samples and dials.

    Raises:
        UserError: There are none, one is broken, or they are of several settings.
    """
    paths = sorted(folder.glob("cell-*.json"))
    cells = [cell for path in paths if (cell := read(path, TeacherCell)) is not None]
    if not cells:
        raise UserError(f"{folder} has no cells of teachers; run `python -m bench.teachers run` first.")
    for path, cell in zip(paths, cells, strict=True):
        if cell.settings != cells[0].settings:
            difference = _difference(cell.settings, cells[0].settings)
            raise UserError(
                f"{path} is of other settings than {paths[0].name} ({difference}); keep them in two folders."
            )
    return sorted(cells, key=lambda cell: (cell.tasks, cell.samples, cell.rho_up, cell.rho_down))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the settings that differ, in words."""
    names = sorted(found.keys() | wanted.keys())
    return ", ".join(f"{n} {found.get(n)}, not {wanted.get(n)}" for n in names if found.get(n) != wanted.get(n))
