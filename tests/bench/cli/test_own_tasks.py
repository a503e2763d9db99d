"""Tasks of files on the command line: run, score and export."""

import argparse
import json
from pathlib import Path

import pytest

from bench.cli import own_tasks
from bench.cli.parser import main
from bench.experiments.profiles import PROFILES
from bench.records import store
from tests.bench.cli.helpers import refused
from tests.own_task_files import prompts, questions, write


@pytest.fixture
def command(base_folder, tmp_path, registry):
    """Make a short run with further arguments."""

    def run(*arguments):
        registry()  # as in a new process
        short = ["--max-steps", 2, "--max-items", 3, "--method", "lora", "--results", tmp_path / "results"]
        return main([str(word) for word in ("run", "--profile", "tiny", "--model", base_folder, *arguments, *short)])

    return run


def records(tmp_path):
    return {record.config.mixture: record for record in store.read_all(tmp_path / "results")}


def test_a_file_is_trained_and_scored(command, tmp_path, capsys):
    path = write(tmp_path / "places.jsonl", questions())
    assert command("--task", path) == 0
    assert "places " in capsys.readouterr().out
    (record,) = store.read_all(tmp_path / "results")
    assert (
        record.config.mixture == "places"
        and record.test["places"].n == 3
        and record.validation["places"].metric == "acc"
    )
    assert set(record.data.sha256) == {"train", "validation", "test", "task places"}


def test_another_file_of_the_same_name_is_another_run(command, tmp_path):
    path = tmp_path / "places.jsonl"
    assert command("--task", write(path, questions())) == 0
    assert command("--task", path) == 0
    assert len(store.read_all(tmp_path / "results")) == 1  # found again
    assert command("--task", write(path, questions()[::-1])) == 0
    changed = questions()
    changed[0]["note"] = "a field that no prompt shows"
    assert command("--task", write(path, changed)) == 0
    first, *others = store.read_all(tmp_path / "results")
    assert len(others) == 2
    assert len({record.config.data_hash for record in (first, *others)}) == 3


def test_another_metric_is_another_run(command, tmp_path):
    write(tmp_path / "say.jsonl", [{**r, "answer": f"{i} {r['answer']}"} for i, r in enumerate(prompts())])
    for metric in ("rougeL", "exact_match"):
        (tmp_path / "say.toml").write_text(f'data = "say.jsonl"\nmetric = "{metric}"\nfields = {{references = "none"}}')
        assert command("--task", tmp_path / "say.toml") == 0
    assert {r.test["say"].metric for r in store.read_all(tmp_path / "results")} == {"rougeL", "exact_match"}


def test_files_join_mixtures_by_name_and_by_description(command, tmp_path, base_folder, registry):
    places, say = write(tmp_path / "places.jsonl", questions()), write(tmp_path / "say.jsonl", prompts())
    (tmp_path / "mine.yaml").write_text("tasks: [majority, places.jsonl, say.jsonl]\nblend: even")
    assert command("--mixture", "intra", "--task", places) == 0  # the tiny profile's substitute for intra
    assert command("--task", places, "--task", say) == 0
    assert command("--mixture", tmp_path / "mine.yaml") == 0
    assert command("--mixture", "inter", "--task", say) == 0
    found = records(tmp_path)
    assert set(found) == {"procedural+places", "places+say", "mine", "procedural-inter+say"}
    assert list(found["mine"].test) == ["majority", "places", "say"]
    assert found["procedural-inter+say"].validation["say_train"].metric == "likelihood"
    registry()
    # Tables of the same folder leave these runs out.
    table = ["table2", "--profile", "tiny", "--methods", "lora", "--seeds", "1", "--max-steps", "2", "--max-items", "2"]
    options = ["--jobs", "1", "--results", str(tmp_path / "results"), "--model", str(base_folder)]
    assert main([*table, *options]) == 0
    assert "places" not in (tmp_path / "results" / "table2.md").read_text()


def test_an_adapter_is_scored_on_a_file(command, base_folder, tmp_path, capsys):
    path = write(tmp_path / "places.jsonl", questions())
    assert command("--task", path, "--save", tmp_path / "adapter") == 0
    trained = capsys.readouterr().out
    options = ["--adapter", tmp_path / "adapter", "--task", path, "--max-items", 3]
    assert main([str(w) for w in ("score", "--profile", "tiny", "--model", base_folder, *options)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("places") and line in trained


def test_mistakes_are_one_line_and_write_nothing(base_folder, tmp_path, capsys, registry):
    path = write(tmp_path / "places.jsonl", questions())
    words = write(tmp_path / "words.jsonl", [{"prompt": f"say apple {i}", "answer": "apple"} for i in range(30)])
    start = ["run", "--profile", "tiny", "--results", tmp_path / "results"]
    for arguments, message in (
        (["--task", tmp_path / "no.jsonl"], "no.jsonl is broken"), (["--task", tmp_path], "is neither data (.jsonl"),
        (["--mixture", tmp_path / "no.yaml"], "no.yaml cannot be read"), (["--mixture", "outer"], "unknown mixture"),
        (["--task", words], "the tiny base model knows"),
        (["--task", write(tmp_path / "piqa.jsonl", questions())], "another task or mixture named 'piqa'"),
    ):  # fmt: skip
        assert message in refused([*start, *arguments], capsys, tmp_path)
        registry()
    assert "unknown task 'outer'" in refused(["export-task", "outer", "--output", tmp_path / "o"], capsys, tmp_path)
    assert "is a file" in refused(["export-task", path, "--output", path], capsys, tmp_path)


def test_a_task_is_exported(tmp_path, capsys, registry):
    assert (
        main(["export-task", str(write(tmp_path / "places.jsonl", questions())), "--output", str(tmp_path / "out")])
        == 0
    )
    assert "lm_eval --include_path" in capsys.readouterr().out
    lines = (tmp_path / "out" / "places_test.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"prompt", "choices", "answer"} for line in lines)


def test_the_example_is_trained_and_the_tiny_base_knows_its_words(command, registry):
    folder = Path(__file__).resolve().parents[3] / "examples" / "own_task"
    assert command("--task", folder / "places.jsonl") == 0
    assert command("--mixture", folder / "mixture.toml") == 0
    registry()
    options = argparse.Namespace(task=[], model=None, data=None)
    assert own_tasks.resolve(options, str(folder / "mixture.toml"), PROFILES["tiny"]) == "majority-places"
