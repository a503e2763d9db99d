"""The runs of every experiment."""

from dataclasses import replace

import pytest

from bench.experiments.methods import BASE
from bench.experiments.registry import EXPERIMENTS
from bench.runs.plan import plan_runs
from tests.bench.conftest import make_setting


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_each_run_belongs_to_one_row(experiment, base_folder, tmp_path):
    """At the ranks of the tiny profile, where two rows might become the same."""
    setting = replace(make_setting(base_folder, tmp_path), mixture=experiment.mixture)
    for runs in plan_runs(setting, experiment, list(experiment.entries), 1, {}):
        for config, _ in runs:
            titles = [entry.title for entry in experiment.entries if experiment.has(entry, config)]
            assert len(titles) == (config.method != BASE), (config.id, titles)
