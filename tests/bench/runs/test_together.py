"""Runs that train together: each is the run made alone."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import bench.runs.together
import bench.train.together
from bench.experiments.methods import BASE
from bench.models.joint import can_join
from bench.runs.pool import run_all
from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.runs.together import group_runs, run_together
from tests.bench.conftest import make_setting

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# On a GPU a run alone has other kernels, in bfloat16. On a CPU records have five digits.
CLOSE = {"rtol": 5e-2, "atol": 1e-2} if torch.cuda.is_available() else {"rtol": 1e-4, "atol": 1e-5}


def without_dropout(base_folder, results, **options):
    return make_setting(base_folder, results, method_options={"lora_dropout": 0.0}, **options)


def plan(setting, *runs):
    """Return runs from tuples of method, seed, learning rate and options."""
    planned = []
    for method, seed, rate, options in runs:
        own = replace(setting, method_options={**setting.method_options, **options})
        planned.append((make_run_config(own, method, seed, rate), own))
    return planned


DIFFERENT: tuple[Any, ...] = (
    ("lora", 0, 1e-2, {}),
    ("malora", 1, 3e-3, {"match_scale": True}),
    ("molora", 0, 1e-2, {"r": 3, "top_k": 1}),
)


def points(record, name):
    return torch.tensor([getattr(point, name) for point in record.train.curve])


@pytest.fixture(scope="module")
def pairs(base_folder, tmp_path_factory):
    """Three different runs, together and alone: pairs of records."""
    folders = [tmp_path_factory.mktemp(name) for name in ("together", "alone")]
    together, alone = (without_dropout(base_folder, folder, max_items=4, max_steps=20) for folder in folders)
    made = list(run_all(plan(together, *DIFFERENT), jobs=1, together=8))
    return list(zip(made, [run(*one) for one in plan(alone, *DIFFERENT)], strict=True))


def test_each_run_is_the_run_made_alone(pairs):
    for made, alone in pairs:
        assert made.config == alone.config and made.status == "ok"
        assert [p.step for p in made.train.curve] == [p.step for p in alone.train.curve] and len(made.train.curve) > 3
        for name in ("loss", "balance_loss", "grad_norm"):
            torch.testing.assert_close(points(made, name), points(alone, name), **CLOSE)
        assert (made.train.steps, made.train.tokens) == (alone.train.steps, alone.train.tokens)
        assert made.parameters == alone.parameters and made.data == alone.data
        assert made.items.keys() == alone.items.keys() and (made.inside is None) == (alone.inside is None)
    assert {made.config.method for made, _ in pairs} == {"lora", "malora", "molora"}
    assert len({tuple(points(made, "loss").tolist()) for made, _ in pairs}) == 3


def test_records_say_that_runs_trained_together(pairs):
    for made, alone in pairs:
        assert (made.provenance.trained_together, made.provenance.concurrent_runs) == (3, 3)
        assert made.train.peak_bytes is None and made.train.seconds.keys() == alone.train.seconds.keys()
        assert all(seconds > 0 for seconds in made.train.seconds.values())
        assert "trained_together" not in json.loads(alone.path.read_text())["provenance"]


def test_a_run_that_diverges_leaves_the_others_alone(base_folder, tmp_path):
    steady = ("malora", 0, 1e-2, {})
    setting = without_dropout(base_folder, tmp_path / "together", max_items=2)
    wild, calm = run_all(plan(setting, ("molora", 0, 1e30, {}), steady), jobs=1, together=2)
    assert wild.status == "diverged" and wild.train.steps < calm.train.steps and wild.test is None
    assert not all(point.loss is not None and point.grad_norm is not None for point in wild.train.curve)
    ((config, own),) = plan(without_dropout(base_folder, tmp_path / "alone", max_items=2), steady)
    alone = run(config, own)
    assert calm.status == "ok" and len(calm.train.curve) == len(alone.train.curve)
    torch.testing.assert_close(points(calm, "loss"), points(alone, "loss"), **CLOSE)


@pytest.mark.parametrize("damaged", [False, True])
def test_training_together_continues_from_checkpoints(damaged, base_folder, tmp_path, monkeypatch, capsys):
    """If the checkpoint of one run is damaged, that run starts anew, and the other continues."""
    whole, broken = (
        without_dropout(base_folder, tmp_path / name, max_items=2, max_steps=8) for name in ("whole", "broken")
    )
    runs = (("lora", 0, 1e-2, {}), ("malora", 1, 1e-2, {}))
    expected = list(run_together(plan(whole, *runs), 2))

    update, updates = bench.train.together._Run.update, iter(range(1000))

    def interrupted(self):
        if next(updates) == 14:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patched:
        patched.setattr(bench.train.together._Run, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(run_together(plan(broken, *runs), 2))
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").iterdir())
    assert len(checkpoints) == 2  # of step 5
    if damaged:
        checkpoints[1].write_bytes(checkpoints[1].read_bytes()[:-1])
    continued = list(run_together(plan(broken, *runs), 2))
    assert capsys.readouterr().err.count("training starts anew.") == damaged
    for made, one in zip(continued, expected, strict=True):
        torch.testing.assert_close(points(made, "loss"), points(one, "loss"), **CLOSE)
    assert not list((tmp_path / "broken" / "checkpoints").iterdir())


def test_passes_have_a_maximum_of_tokens(base_folder, tmp_path, monkeypatch):
    runs = (("lora", 0, 1e-2, {}), ("malora", 1, 1e-2, {}))
    setting = without_dropout(base_folder, tmp_path / "one", max_items=1, max_steps=5)
    whole = list(run_together(plan(setting, *runs), 2))
    monkeypatch.setitem(bench.train.together.MAX_JOINT_TOKENS, "cpu", 1)
    monkeypatch.setitem(bench.train.together.MAX_JOINT_TOKENS, "cuda", 1)
    setting = without_dropout(base_folder, tmp_path / "two", max_items=1, max_steps=5)
    for made, one in zip(run_together(plan(setting, *runs), 2), whole, strict=True):
        torch.testing.assert_close(points(made, "loss"), points(one, "loss"), **CLOSE)


@pytest.mark.parametrize("error, expected", [(torch.OutOfMemoryError("60 GiB"), [3, 2]), (RuntimeError("bug"), [3])])
def test_runs_that_cannot_train_together_are_divided(error, expected, setting, monkeypatch):
    sizes = []

    def crowded(group):
        sizes.append(len(group))
        raise error

    monkeypatch.setattr(bench.runs.together, "_train", crowded)
    monkeypatch.setattr(bench.runs.together, "run", lambda config, setting, trained: config.seed)
    runs = plan(setting, *(("malora", seed, 1e-3, {}) for seed in range(3)))
    assert list(run_together(runs, 8)) == [0, 1, 2] and sizes == expected


def test_only_runs_that_fit_together_form_groups(setting):
    runs = plan(setting, ("lora", 0, 1e-3, {}), ("dora", 0, 1e-3, {}), ("malora", 0, 1e-3, {}), ("malora", 1, 1e-3, {}))
    runs = [(make_run_config(setting, BASE, 0), setting), *runs]
    longer = replace(setting, profile=replace(setting.profile, epochs=2))
    runs += plan(longer, ("malora", 0, 1e-3, {}))
    methods = [[config.method for config, _ in group] for group in group_runs(runs, 2)]
    assert methods == [["base"], ["lora", "malora"], ["dora"], ["malora"], ["malora"]]


def test_methods_that_would_differ_are_made_alone():
    assert can_join("lora", {}) and can_join("malora", {"backend": "dense"}) and can_join("asylora", {})
    assert not can_join("dora", {}) and not can_join("malora", {"backend": "fp8"})
    assert not can_join("lora", {"init_lora_weights": "pissa"}) and not can_join("lora", {"lora_bias": True})
    assert not can_join("malora", {"bias": "all"}) and not can_join("malora", {"modules_to_save": ["lm_head"]})
