"""The exported figures are those of the pages."""

import csv
import json
import math

import pandas as pd
import pytest

from bench.cli import exports
from bench.cli.parser import main
from bench.experiments.registry import EXPERIMENTS
from bench.records import store
from bench.report.export import COLUMNS, MEAN, export_frames
from bench.report.readme import published_selections
from bench.report.scores.document import Leaderboard
from bench.report.scores.experiment_page import experiment_sections
from tasks import TASKS
from tests.bench.cli.helpers import refused
from tests.bench.records.test_store import make


@pytest.fixture(scope="module")
def published():
    return {profile: store.read_all(store.RESULTS / profile) for profile in ("tiny", "small")}


@pytest.fixture(scope="module")
def frames(published):
    return export_frames(published)


def number(cell, digits=".1f"):
    return "" if cell is None or math.isnan(cell) else format(cell, digits)


def test_every_leaderboard_has_the_figures_of_its_page(published, frames):
    """Make the page's cells from the exported rows again, and compare the texts.

    One profile has all tables. Another has the same ones and more records.
    """
    table = frames["leaderboards"]
    seen = 0
    for selection in published_selections({"tiny": published["tiny"]}):
        experiment = selection.experiment
        boards = [one for one in experiment_sections(selection) if isinstance(one, Leaderboard)]
        mine = table[(table["profile"] == selection.profile) & (table["experiment"] == experiment.name)]
        assert len(boards) == mine["rates"].nunique()
        for board, (_, rows) in zip(boards, mine.groupby("rates", sort=False), strict=True):
            by_title = dict(list(rows.groupby("row", sort=False)))
            assert list(by_title) == [row.title for row in board.rows]
            for row, cells in board.lines:
                page = dict(zip(board.head, cells, strict=True))
                if row is None:
                    check_the_papers_figures(page, by_title[page["method"].strip("*").removesuffix(", the paper's")])
                else:
                    check_a_row(page, by_title[row.title], board.head[-1])
                seen += 1
    assert seen > 70


def check_a_row(page, exported, against):
    by_task = exported.set_index("task")
    mean = by_task.loc[MEAN]
    assert page["rate"] == number(mean["learning_rate"], "g")
    if not page["mean"]:
        assert mean["seeds"] == 0 and mean["broken"] > 0 and list(by_task.index) == [MEAN]
        return
    assert page["seeds"] == str(mean["seeds"]) and page["trainable"] == number(mean["trainable"], ",.0f")
    assert page["mean"] == f"{mean['mean']:.1f} ± {(mean['high'] - mean['low']) / 2:.1f}"
    for task in by_task.index.drop(MEAN):
        assert page[TASKS[task].title] == number(by_task.loc[task, "mean"])
    assert by_task.drop(index=MEAN)["mean"].mean() == pytest.approx(mean["mean"])
    verdict = ""
    if isinstance(mean["verdict"], str):
        ends = f"[{mean['difference_low']:+.1f}, {mean['difference_high']:+.1f}]"
        verdict = f"{mean['verdict']}: {mean['difference']:+.1f} {ends}, p={mean['p']:.2g}"
    elif page["method"] != "base, no adapter":
        verdict = "reference" if "best" not in against else "best"
    assert page[against].startswith(verdict) and bool(page[against]) >= bool(verdict)


def check_the_papers_figures(page, exported):
    for row in exported.to_dict("records"):
        title = "mean" if row["task"] == MEAN else TASKS[row["task"]].title
        assert page[title].strip("*") == number(row["paper"])


def test_there_is_one_row_per_run_and_one_per_score(published, frames):
    records = {record.id: record for mine in published.values() for record in mine}
    runs, scores = frames["runs"], frames["scores"]
    assert sorted(runs["id"]) == sorted(records) and not runs["id"].duplicated().any()
    for row in runs.to_dict("records"):
        record = records[row["id"]]
        assert (
            row["method"] == record.config.method and json.loads(row["method_options"]) == record.config.method_options
        )
        assert number(row["test"], ".6f") == number(record.mean(), ".6f")
        assert row["status"] == record.status and row["device"] == record.provenance.device
        if record.train:
            seconds = row["training_seconds"] + row["evaluation_seconds"]
            assert seconds == pytest.approx(sum(record.train.seconds.values()))
    assert not scores.duplicated(["id", "split", "task"]).any()
    means = scores[scores["split"] == "test"].groupby("id")["score"].mean()
    assert means.to_dict() == pytest.approx({one.id: one.mean() for one in records.values() if one.test})


def test_every_column_is_filled_somewhere_and_documented(frames):
    page = (store.ROOT / "docs" / "benchmark" / "leaderboards.md").read_text()
    for name, columns in COLUMNS.items():
        assert list(frames[name].columns) == list(columns)
        for column, meaning in columns.items():
            assert f"| `{column}` | {meaning} |" in page, (name, column)
            assert column.startswith("max_") or frames[name][column].notna().any(), (name, column)


def test_csv_and_json_files_have_the_frames(published, frames, tmp_path, capsys, monkeypatch):
    def made(records):
        assert {name: [r.id for r in records[name]] for name in published} == {
            name: [r.id for r in mine] for name, mine in published.items()
        }
        return frames

    monkeypatch.setattr(exports, "export_frames", made)
    assert main(["export", "--output", str(tmp_path / "deep" / "export")]) == 0
    out = capsys.readouterr().out
    for name, frame in frames.items():
        path = tmp_path / "deep" / "export" / f"{name}.csv"
        assert f"{len(frame)} rows in {path}" in out
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == list(COLUMNS[name])
        rows = json.loads(path.with_suffix(".json").read_text())
        from_json = pd.DataFrame(rows, columns=list(COLUMNS[name]))
        from_csv = pd.read_csv(path)
        assert len(from_csv) == len(from_json) == len(frame)
        for column in frame.columns:
            if pd.api.types.is_float_dtype(frame[column]):
                assert from_csv[column].tolist() == pytest.approx(frame[column].tolist(), rel=1e-12, nan_ok=True)
                assert from_json[column].astype(float).tolist() == pytest.approx(
                    frame[column].tolist(), rel=1e-12, nan_ok=True
                )


def test_local_records_are_exported_by_their_profile(tmp_path, capsys):
    runs = [make(seed, method=method, rate=4e-4) for seed in (0, 1) for method in ("lora", "malora")]
    for record in [*runs, make(0, "diverged", "molora", rate=4e-4)]:
        store.write(record, tmp_path / "results")
    assert main(["export", "--results", str(tmp_path / "results"), "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    table = pd.read_csv(tmp_path / "leaderboards.csv")
    assert set(table["profile"]) == {"tiny"} and set(table["method"]) >= {"lora", "malora"}
    assert set(table["experiment"]) <= set(EXPERIMENTS) and len(pd.read_csv(tmp_path / "runs.csv")) == 5
    (diverged,) = table[table["method"] == "molora"].to_dict("records")
    assert diverged["broken"] == 1 and diverged["seeds"] == 0 and math.isnan(diverged["mean"])


def test_folders_that_cannot_be_read_or_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "has no folder runs" in refused(["export", "--results", tmp_path], capsys, tmp_path)
    store.write(make(), tmp_path / "results")
    command = ["export", "--results", tmp_path / "results", "--output", tmp_path / "file" / "below"]
    assert "below cannot be a folder" in refused(command, capsys, tmp_path)
