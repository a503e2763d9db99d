"""Estimates of a run's time, from records and without any."""

import re
from dataclasses import replace

import pytest
import torch

from bench.experiments.methods import BASE, ELSEWHERE
from bench.experiments.registry import EXPERIMENTS
from bench.models.base import count_weights, load, prepare
from bench.records.schema import Parameters, TrainSection
from bench.runs.estimate import Estimate, assumed_rate, estimate, missing_runs, summarize
from bench.runs.plan import plan_runs, rates_before_sweep
from bench.runs.run import run
from bench.runs.setting import load_data, make_run_config
from bench.runs.sweep import sweep_round
from bench.runs.work import duration
from tests.bench.conftest import CLEAN, make_setting
from tests.bench.records.test_store import make

DEVICE = CLEAN.device


def timed(config, training, evaluation, steps=10, device=DEVICE, jobs=1, **changes):
    """A record of a run with this configuration that took this long; it has 2 x 80 scored items."""
    train = TrainSection(
        steps=steps,
        tokens=1,
        seconds={"forward": training / 2, "backward": training / 2, "evaluation": evaluation},
        curve=[],
        router=[],
        peak_bytes=None,
    )
    provenance = CLEAN.replace(device=device, concurrent_runs=jobs)
    return make(config=config.replace(**changes), train=train, provenance=provenance)


@pytest.fixture
def planned(setting):
    """A configuration of LoRA, its settings, its steps and its scored items."""
    config = make_run_config(setting, "lora", seed=0)
    data = load_data(setting, 0)
    items = sum(map(len, [*data.validation.values(), *data.test.values()]))
    return config, setting, -(-len(data.train) // 8), items


def test_records_of_the_same_device_and_method_are_preferred(planned):
    config, setting, steps, items = planned
    same = [timed(config, 10 * seconds, 16.0) for seconds in (1, 2, 9)]
    other_method = timed(config, 1e6, 0.0, method="malora")
    other_device = timed(config, 1e7, 0.0, device="another CPU")
    other_mixture = timed(config, 1e8, 0.0, mixture="procedural-inter")
    other_model = timed(config, 1e8, 0.0, model="another")
    broken = timed(config, 1e9, 0.0).replace(status="diverged")
    records = [*same, other_method, other_device, other_mixture, other_model, broken]

    def expected(per_step, per_item):
        return pytest.approx(per_step * steps + per_item * items)

    found = estimate(config, setting, records, DEVICE)
    assert found.seconds == expected(2.0, 0.1) and found.source == "median of 3 records of lora on a CPU"
    found = estimate(config, setting, records[3:], DEVICE)
    assert found.seconds == expected(1e5, 0.0) and found.source == "median of 1 record of other methods on a CPU"
    found = estimate(config, setting, records[4:], DEVICE)
    assert found.seconds == expected(1e6, 0.0) and found.source == "median of 1 record of lora on another CPU"
    crowded = timed(config, 20.0, 0.0, device="another CPU", jobs=8)
    assert estimate(config, setting, [crowded], DEVICE).source.endswith("on another CPU, 8 runs at a time")


def test_a_run_that_is_cut_short_takes_its_share(planned, base_folder, tmp_path):
    config, _, _, _ = planned
    setting = make_setting(base_folder, tmp_path, max_steps=3, max_items=2)
    short = make_run_config(setting, "lora", seed=0)
    found = estimate(short, setting, [timed(config, 20.0, 16.0)], DEVICE)
    assert found.seconds == pytest.approx(2.0 * 3 + 0.1 * 2 * (5 + 5))  # five tasks, on two splits


def test_a_trial_counts_its_first_steps_once(planned):
    """Half of its 20 seconds were compilation and capture."""
    config, setting, steps, items = planned
    trial = timed(config, 20.0, 16.0, max_steps=10)
    trial = trial.replace(train=trial.train.replace(steady_step_seconds=1.0))
    found = estimate(config, setting, [trial], DEVICE)
    assert found.seconds == pytest.approx(10.0 + 1.0 * steps + 0.1 * items) and found.source.endswith(", cut short")


def test_a_base_model_of_the_same_size_stands_for_one_without_records(planned):
    config, setting, steps, items = planned
    weights = count_weights(prepare(setting.model))
    other = timed(config, 20.0, 16.0, model="random-7b")
    alike, larger = (
        other.replace(parameters=Parameters(trainable=5, total=5 + n, adapter_bytes=20)) for n in (weights, 2 * weights)
    )
    found = estimate(config, setting, [alike, larger], DEVICE)
    assert found.seconds == pytest.approx(2.0 * steps + 0.1 * items)
    assert found.source == f"median of 1 record of lora with random-7b, which is as large, on {DEVICE}"
    assert estimate(config, setting, [larger], DEVICE).source.startswith("no record")


def test_larger_models_are_assumed_to_keep_a_gpu_busier():
    rates = [assumed_rate("cuda", weights) for weights in (135e6, 6.7e9, 70e9)]
    assert rates[0] == 30e12 and 250e12 < rates[1] < 350e12 and rates[2] == 400e12


def test_base_and_adapters_from_elsewhere_are_scored_on_the_test_set_alone(planned):
    config, setting, _, _ = planned
    base = make_run_config(setting, BASE, 0)
    tests = sum(map(len, load_data(setting, 0).test.values()))
    found = estimate(base, setting, [timed(config, 20.0, 16.0)], DEVICE)
    assert found.seconds == pytest.approx(0.1 * tests) and found.source.startswith(
        "median of 1 record of other methods"
    )
    elsewhere = base.replace(method=f"{ELSEWHERE}adapter")
    assert estimate(elsewhere, setting, [timed(config, 20.0, 16.0)], DEVICE) == found


def test_without_records_the_rate_is_stated(planned):
    config, setting, _, _ = planned
    weights = count_weights(prepare(setting.model))
    model, _ = load(prepare(setting.model), setting.device)
    assert weights == sum(p.numel() for p in model.parameters())
    data = load_data(setting, 0)
    trained = sum(len(e.prompt + e.label) for e in data.train) / 4
    items = [e for split in (data.validation, data.test) for task in split.values() for e in task]
    scored = sum(len(e.prompt) + sum(map(len, e.choices)) for e in items) / 4
    expected = (4 * trained + 2 * scored) * weights / (0.05e12 * torch.get_num_threads())
    found = estimate(config, setting, [], DEVICE)
    assert found.seconds == pytest.approx(expected)
    assert re.fullmatch(
        r"no record of this model and mixture; 0\.\d+ TFLOP/s assumed until it is measured", found.source
    )
    assert estimate(config, setting, [], DEVICE, jobs=2).seconds == pytest.approx(2 * expected)


def test_only_runs_without_a_record_are_missing(base_folder, tmp_path):
    setting = make_setting(base_folder, tmp_path, max_steps=1, max_items=1)
    runs = [(make_run_config(setting, method, seed=0), setting) for method in ("lora", "malora", "lora")]
    assert [config.method for config, _ in missing_runs(runs)] == ["lora", "malora"]
    run(*runs[0])
    assert [config.method for config, _ in missing_runs(runs)] == ["malora"]


@pytest.mark.parametrize("name", ["table2", "table11"])
def test_as_many_runs_are_planned_before_a_sweep_as_after_it(name, base_folder, tmp_path):
    """The rates that the sweep will choose are not known, and its runs are part of the table."""
    experiment = EXPERIMENTS[name]
    setting = replace(make_setting(base_folder, tmp_path), mixture=experiment.mixture)
    groups = experiment.tuning_groups

    def count(tuned):
        batches = plan_runs(setting, experiment, experiment.entries, 2, tuned)
        return len(
            {
                config.id
                for config, _ in [*sweep_round(setting, groups, []), *(run for batch in batches for run in batch)]
            }
        )

    expected = count(rates_before_sweep(setting, groups))
    assert expected == count(dict.fromkeys(groups, setting.profile.rates[-1]))
    assert expected > count(dict.fromkeys(groups, setting.profile.paper_rate)) or not experiment.both_rates


def test_the_summary_counts_runs_and_shares_the_time(setting):
    runs = [(make_run_config(setting, "lora", seed), setting) for seed in range(4)]
    hour = Estimate(3600.0, "median of 3 records")
    assert summarize("table2", runs, [], [], 2) == "table2: 0 of 4 runs to make."
    assert summarize("table2", [*runs, runs[0]], runs[:1], [hour], 2) == (
        "table2: 1 of 4 runs to make, about 60 min (median of 3 records)."
    )
    others = [hour, hour, Estimate(4 * 3600.0, "no record")]
    assert summarize("table2", runs, runs[1:], others, 2) == (
        "table2: 3 of 4 runs to make, about 4 h 0 min, 2 at a time (median of 3 records, and 1 more)."
    )
    assert [duration(seconds) for seconds in (0.1, 89, 100, 5300, 12000)] == [
        "1 s",
        "89 s",
        "2 min",
        "88 min",
        "3 h 20 min",
    ]
