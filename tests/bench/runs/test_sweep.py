"""The search for learning rates, and the runs that tell which tasks are at floor."""

import itertools
import math
from dataclasses import replace

import pytest

from bench.experiments.profiles import GRID, PROFILES, TUNING_SEED
from bench.records.schema import TaskScore
from bench.runs.sweep import MAX_RATES, expected_sweep, floor_runs, next_rates, sweep_round
from tests.bench.conftest import make_setting
from tests.bench.records.test_store import make

FIRST = PROFILES["small"].first_rates


def search(loss_at):
    """Return the rates in the order in which a search tries them."""
    losses: dict[float, float] = {}
    while rates := next_rates(losses, GRID, FIRST):
        losses |= {rate: loss_at(rate) for rate in rates}
    return list(losses)


def test_the_grid_has_a_constant_ratio():
    assert all(1.45 < high / low < 1.55 for low, high in itertools.pairwise(GRID)) and set(FIRST) <= set(GRID)
    assert PROFILES["small"].sweep_seed == 99 and PROFILES["small"].on("inter-open").rates == GRID


@pytest.mark.parametrize(
    "optimum, tried",
    [
        (9e-4, [4e-4, 9e-4, 2e-3, 6e-4, 1.35e-3]),
        (6e-4, [4e-4, 9e-4, 2e-3, 2.7e-4, 6e-4]),
        (2e-3, [4e-4, 9e-4, 2e-3, 1.35e-3, 3e-3]),
        (4.5e-3, [4e-4, 9e-4, 2e-3, 1.35e-3, 3e-3, 4.5e-3]),
        (1.2e-4, [4e-4, 9e-4, 2e-3, 2.7e-4, 6e-4, 1.8e-4, 1.2e-4]),
    ],
)
def test_a_search_ends_when_both_neighbours_of_the_best_rate_were_tried(optimum, tried):
    assert search(lambda rate: abs(math.log(rate / optimum)) + 0.001 * (rate > optimum)) == tried
    assert len(tried) <= MAX_RATES


def test_a_diverged_rate_cannot_win_and_of_equal_losses_the_lower_rate_wins():
    assert search(lambda rate: math.inf if rate > 5e-4 else 1.0)[3:] == [2.7e-4, 6e-4, 1.8e-4, 1.2e-4]
    assert search(lambda rate: math.inf) == [4e-4, 9e-4, 2e-3, 2.7e-4, 1.8e-4, 1.2e-4]
    assert next_rates({4e-4: 2.0, 9e-4: 1.0, 2e-3: 1.0}, GRID, FIRST) == [6e-4, 1.35e-3]


def swept(method, rate, loss):
    score = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 9, "version": 2}
    losses = {"lexicon": loss, "majority": 9 - loss}
    return make(TUNING_SEED, method=method, rate=rate, validation={
        task: TaskScore(**score, loss=one, label_tokens=9) for task, one in losses.items()})  # fmt: skip


def test_each_method_has_a_search_of_its_own(base_folder, tmp_path):
    setting = make_setting(base_folder, tmp_path)
    setting = replace(setting, profile=replace(setting.profile, rates=GRID, first_rates=FIRST))
    groups = ["lora", "malora"]
    first = sweep_round(setting, groups, [])
    assert [(c.method, c.learning_rate, c.seed) for c, _ in first] == [(m, r, 99) for m in groups for r in FIRST]
    assert len(expected_sweep(setting, groups, [])) == 2 * 5
    # Without the second task, whose loss rises as the first one's falls, 2e-3 is the best rate of malora.
    made = [swept(m, r, 3 - (10 + 90 * (m == "malora")) * r) for m in groups for r in FIRST]
    second = sweep_round(setting, groups, made, {"majority"})
    assert [c.learning_rate for c, _ in second] == [1.35e-3, 3e-3] * 2
    tied = [c.learning_rate for c, _ in sweep_round(setting, groups, made)]  # both tasks together lose the same
    assert tied == [2.7e-4, 6e-4] * 2


def test_floors_are_tried_again_at_the_next_rate_where_they_fail(base_folder, tmp_path):
    setting = replace(make_setting(base_folder, tmp_path), mixture="classify")
    base, *alone = floor_runs(setting, [])
    assert base[0].method == "base" and base[0].mixture == "procedural-classify" and base[0].format == "letters"
    assert {(c.learning_rate, c.seed, c.method) for c, _ in alone} == {(6e-4, 99, "lora")}
    assert [c.mixture for c, _ in alone][:2] == ["procedural-classify/lexicon", "procedural-classify/majority"]

    def record(config, value):
        task = config.mixture.rpartition("/")[2]
        score = TaskScore(metric="acc", value=value, stderr=0.05, n=99, version=2, loss=1, label_tokens=99, guess=0.5)
        one = make(0)
        return one.replace(config=config, validation={task: score}, test={task: one.test["lexicon"]})

    made = [record(c, 0.9 if c.mixture.endswith("lexicon") else 0.6) for c, _ in alone]
    again = floor_runs(setting, [make(0, method="base", rate=None), *made])
    assert [c.mixture for c, _ in again] == [c.mixture for c, _ in alone][1:]
    assert {c.learning_rate for c, _ in again} == {9e-4}
    assert floor_runs(setting, [*made, *(record(c, 0.5) for c, _ in again)]) == []
