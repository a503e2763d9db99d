"""Cells are run once, read again, and refused if they are of other settings."""

import json

import pytest

from bench.experiments.profiles import GRID
from bench.records.teacher_cells import TeacherRates, cell_path, rates_path, read, read_cells
from bench.teachers.cells import choose_rate
from bench.teachers.cli import main

CELL = [
    "run",
    "--tasks",
    "2",
    "--samples",
    "32",
    "--rho",
    "0,1",
    "--rho-up",
    "0,1",
    "--seeds",
    "0,1",
    "--students",
    "molora,malora-d16",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def made(folder):
    assert main([*CELL, "--steps", "2", "--batch", "4", "--together", "4", "--out", str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cell_has_one_record(made, folder):
    assert len(made) == 5 and "rates-T2-N32.json" in made and "cell-T2-N32-down0-up1.json" in made
    cells = read_cells(folder)
    assert [(cell.rho_down, cell.rho_up) for cell in cells] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(len(result.errors) == 2 for cell in cells for result in cell.students.values())
    assert cells[0].predicted_crossover == 1 - 8 / 32
    assert cells[0].checks["cosine_error"] < 1e-6 and cells[0].checks["known_down"] > 0.5
    rates = read(rates_path(folder, 2, 32), TeacherRates)
    assert rates is not None and {len(losses) for losses in rates.losses.values()} == {len(GRID)}
    assert cells[0].students["molora"].learning_rate == rates.chosen["molora"]


def test_a_second_run_adds_only_what_is_missing(made, folder, capsys):
    missing = cell_path(folder, 2, 32, 1.0, 0.0)
    missing.unlink()
    assert main([*CELL, "--steps", "2", "--batch", "4", "--out", str(folder)]) == 0
    assert ": 1\n" in capsys.readouterr().out
    again = json.loads(missing.read_bytes())
    before = json.loads(made[missing.name])
    # Trained by itself now, and not with three other cells: other dropout masks, same data.
    assert again["checks"] == before["checks"] and again["settings"] == before["settings"]
    assert all(path.read_bytes() == made[path.name] for path in folder.iterdir() if path != missing)


def test_other_settings_are_refused(made, folder, capsys):
    assert main([*CELL, "--steps", "3", "--batch", "4", "--out", str(folder)]) == 2
    assert "steps 2, not 3" in capsys.readouterr().err


def test_report_reads_the_records(made, folder, capsys):
    assert main(["report", "--out", str(folder), "--second", "malora-d16"]) == 0
    out = capsys.readouterr().out
    assert "# malora-d16 against molora" in out and "## 2 tasks" in out
    assert main(["report", "--out", str(folder), "--second", "malora-d64"]) == 2
    assert "unknown student 'malora-d64'" in capsys.readouterr().err


def test_errors_name_what_to_do(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "run `python -m bench.teachers run` first" in capsys.readouterr().err
    assert main(["run", "--tasks", "80", "--out", str(tmp_path)]) == 2
    assert "80 tasks of rank 8 need" in capsys.readouterr().err
    (tmp_path / "cell-T2-N32-down0-up0.json").write_text("{}", encoding="utf-8")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "is not a record of teachers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0,99", "99 is the seed of the learning rates"),
        ("--seeds 1,1", "has a value twice"),
        ("--rho 1.5", "must be a number from 0 to 1"),
        ("--separation nan", "must be a number from 0 to 1000"),
        ("--students molora,malora", "unknown student 'malora'"),
    ],
)
def test_bad_values_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_rate_is_the_one_that_the_protocols_search_finds():
    # The search begins with 4e-4, 9e-4 and 2e-3, and stops where both rates next to the best are worse.
    losses = {rate: abs(place - 6) + 1.0 for place, rate in enumerate(GRID)}
    assert choose_rate(losses) == GRID[6]
    two_valleys = losses | {GRID[0]: 0.1}
    assert choose_rate(two_valleys) == GRID[6]
    assert choose_rate(dict.fromkeys(GRID, float("inf")) | {GRID[0]: 1.0}) == GRID[0]
