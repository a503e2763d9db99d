"""The size of a run, and the time that its first step tells."""

import re

import pytest

from bench.runs import calibration, work
from bench.runs.run import run
from bench.runs.setting import load_data, make_run_config
from bench.runs.work import first_step, work_of
from tests.bench.conftest import make_setting


def test_the_first_step_tells_the_rest(setting):
    """40 s for 100 tokens; training has tokens per character as counted, and scoring half of the operations."""
    config = make_run_config(setting, "lora", seed=0)
    data, lines = load_data(setting, 0), []
    characters = sum(len(e.prompt + e.label) for e in data.train)
    measured = first_step(config, data, characters, lines.append)  # a token per character, not per four
    measured(0.5, 100, 12)
    assert lines == []  # fast enough to wait for
    measured(40.0, 100, 12)
    items = [e for split in (data.validation, data.test) for task in split.values() for e in task]
    scored = sum(len(e.prompt) + sum(map(len, e.choices)) for e in items)
    training = 0.4 * characters / len(data.train) * config.batch_size * 12
    assert lines == [
        f"by the first step, which took 40 s: another {work.duration(training)} of training, and then about "
        f"{work.duration(0.2 * scored)} of scoring"
    ]


def test_whole_answers_are_scored_with_a_prompt_each(setting):
    letters = make_run_config(setting, "base", seed=0)
    data = load_data(setting, 0)
    prompts = sum(len(e.prompt) * (len(e.choices) - 1) for task in data.test.values() for e in task) / 4
    more = work_of(letters.replace(format="cloze"), data).scored_tokens - work_of(letters, data).scored_tokens
    assert more == pytest.approx(prompts)


def test_a_run_on_a_cpu_says_how_long_it_takes(base_folder, tmp_path, monkeypatch, capsys, fresh_accelerator):
    """Before the first step, by a short pass, and after it. Neither changes the run."""
    unmeasured = make_setting(base_folder, tmp_path / "unmeasured", max_steps=2, max_items=2)
    expected = run(make_run_config(unmeasured, "malora", seed=0), unmeasured)
    assert "by " not in capsys.readouterr().err
    monkeypatch.setattr(work, "MIN_SECONDS_OF_FIRST_STEP", 0.0)
    monkeypatch.setattr(calibration, "MIN_WEIGHTS", 0)
    setting = make_setting(base_folder, tmp_path, max_steps=2, max_items=2)
    config = make_run_config(setting, "malora", seed=0)
    found = run(config, setting)
    assert found.status == "ok" and (found.train.curve, found.items) == (expected.train.curve, expected.items)
    shown = capsys.readouterr().err
    assert re.search(r"by a short pass: about \d+ s of training, and then about \d+ s of scoring", shown)
    names = re.findall(r"(\S+): by the first step, which took 1 s: another \d+ s of training, and then about", shown)
    assert names == [config.id]
