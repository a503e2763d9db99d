"""Sweeps that search, and tasks at floor, from the command line."""

from dataclasses import replace

import pytest

from bench.cli.parser import main
from bench.experiments.profiles import GRID, PROFILES
from bench.records import store
from bench.records.schema import GoldAnswers
from tests.bench.cli.helpers import refused, snapshot
from tests.bench.conftest import SOURCE


def score_by_task(model, tokenizer, examples, **options):
    """Replaces lm-eval. Only the first task is learned."""
    gold = {task: GoldAnswers(nats=[1.0, 2.0], label_tokens=[1, 1]) for task in examples}
    scores, outcomes = {}, {}
    for task, found in gold.items():
        outcomes[task] = [1, 1] if task == "lexicon" else [0, 1]
        value = sum(outcomes[task]) / 2
        row = {"metric": "acc", "value": value, "stderr": 1 - value, "n": 2, "version": 2, "guess": 0.25}
        scores[task] = row | found.summary(outcomes[task])
    return scores, outcomes, gold


@pytest.fixture
def command(base_folder, tmp_path, monkeypatch):
    profile = replace(PROFILES["tiny"], source=SOURCE, rates=GRID[:5], first_rates=GRID[2:3])
    monkeypatch.setitem(PROFILES, "tiny", profile)
    monkeypatch.setattr("bench.runs.run.score", score_by_task)
    options = f"--profile tiny --max-steps 1 --max-items 2 --jobs 1 --model {base_folder} --results {tmp_path}"
    return ["classify", "--methods", "lora", *options.split()]


def test_a_search_goes_on_until_the_best_rate_has_neighbours(command, tmp_path, capsys):
    """All losses are equal, so the lowest rate wins."""
    assert main([*command, "--only-sweep", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("classify: 3 of 3 runs to make")
    assert main([*command, "--only-sweep"]) == 0
    assert "LoRA: 0.00012" in capsys.readouterr().out
    configs = [one.config for one in store.read_all(tmp_path)]
    assert {(c.learning_rate, c.seed) for c in configs} == {(rate, 99) for rate in GRID[:4]}
    assert {(c.mixture, c.format) for c in configs} == {("procedural-classify", "cloze")}
    assert (
        main([*command, "--sweep", "--seeds", "1", "--epochs", "2", "--dry-run"]) == 0
    )  # another length, another sweep
    assert capsys.readouterr().out.splitlines()[-1].startswith("classify: 5 of 5 runs to make")
    before = snapshot(tmp_path)
    assert main([*command, "--sweep", "--seeds", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("classify: 2 of 6 runs to make")
    assert main([*command, "--seeds", "1", "--dry-run"]) == 0  # nothing is published for this base
    assert "-lora-lr0.00012-s0-" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_floors_are_printed_and_their_runs_recorded(command, tmp_path, capsys):
    command = [word for word in command if word not in ("--methods", "lora")]
    assert main([*command, "--floors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith(" learned")] == ["lexicon"]
    assert len([line for line in lines if line.endswith("at floor")]) == 4
    single = [one.config for one in store.read_all(tmp_path) if one.config.method == "lora"]
    assert sorted(c.learning_rate for c in single) == [6e-4] * 5 + [9e-4] * 4
    assert {c.seed for c in single} == {99} and len({c.mixture for c in single}) == 5


def test_options_that_would_be_ignored_are_refused(command, capsys, tmp_path):
    assert "--floors makes no table; leave out --methods" in refused([*command, "--floors"], capsys, tmp_path)
    message = refused([*command[:1], *command[3:], "--floors", "--sweep"], capsys, tmp_path)
    assert "--floors makes no table; leave out --sweep" in message


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "x"])
def test_a_warm_up_is_a_share_of_the_steps(value, command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--warmup-ratio", value])
    assert exit.value.code == 2 and "must be a number from 0 to 1" in capsys.readouterr().err
