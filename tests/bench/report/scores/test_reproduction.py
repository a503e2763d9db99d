"""A reproduction is compared with the published runs, their answers, and how far other processors move them."""

import math

import pytest
from scipy.stats import t as student

from bench.records import store
from bench.report.scores import processors
from bench.report.scores.processors import differences, half_width
from bench.report.scores.reproduction import reproduction
from bench.report.scores.selection import LearningRates, records_frame, select
from tests.bench.records.test_store import make
from tests.bench.report.scores.test_experiment_page import TABLE2


@pytest.fixture
def points(monkeypatch):
    """Measured differences: 3 and 4 points at one rate, none at the paper's."""
    runs = [{"rate": 2e-3, "score": 53.0, "published": 50.0}, {"rate": 2e-3, "score": 46.0, "published": 50.0}]
    runs += [{"rate": 4e-4, "score": 50.0, "published": 50.0}] * 2
    monkeypatch.setattr(
        processors, "measured", content := lambda: {"profile": "tiny", "mixture": "procedural", "runs": runs}
    )
    monkeypatch.setattr("bench.report.scores.reproduction.measured", content)


def text(right, published=(0.3, 0.5, 0.7), rate=2e-3, seeds=(0, 1, 2)):
    theirs = [make(seed, method="lora", rate=rate, right=one) for seed, one in enumerate(published)]
    if rate != 4e-4:
        theirs += [make(seed, method="lora", rate=4e-4, right=0.1) for seed in (0, 1, 2)]  # so the other rate is chosen
    mine = [make(seed, method="lora", rate=rate, right=right) for seed in seeds]
    selection = select(TABLE2, "tiny", records_frame(mine), rates=LearningRates({"lora": rate}, TABLE2))
    return reproduction(selection, records_frame(theirs))


def test_the_bound_is_that_of_runs_alike(points):
    config = make(0, method="lora", rate=2e-3).config
    assert differences(config) == [3.0, -4.0] and differences(config.replace(learning_rate=4e-4)) == [0.0, 0.0]
    assert half_width(config, 2) == pytest.approx(student.ppf(0.975, 2) * math.sqrt(12.5 / 2))
    for other in ({"mixture": "procedural-inter"}, {"profile": "small"}, {"learning_rate": 3e-3}):
        assert half_width(config.replace(**other), 2) is None


def test_runs_that_moved_no_further_than_on_other_processors_are_reproduced(points):
    assert "**reproduced**: 55.0 here, 50.0 published, +5.0 where ±8.8 is within the bound of other processors" in text(
        0.55
    )
    assert "made again as on other processors" in text(0.55)


def test_runs_that_moved_further_are_compared_with_other_seeds(points):
    within, beyond = text(0.65), text(0.65, published=(0.48, 0.5, 0.52))
    assert "**reproduced**: 65.0 here" in within and "published interval, but other processors give ±8.8" in within
    assert "**not reproduced**: 65.0 here" in beyond and "but other processors give ±8.8" in beyond


def test_the_same_answers_are_said_to_be(points):
    assert "0.0004: **reproduced**: 50.0 here, 50.0 published, with the same answers in every run." in text(
        0.5, published=(0.5, 0.5, 0.5), rate=4e-4
    )


def test_other_seeds_have_no_bound_of_processors(points):
    assert "processors" not in text(0.55, seeds=(0, 1)).partition("\n\n")[0]


def test_the_measured_runs_are_repetitions_of_published_records():
    content = processors.measured()
    published = {record.id: record for record in store.read_all(store.RESULTS / content["profile"])}
    assert len(content["runs"]) > 10
    for run in content["runs"]:
        record = published[run["id"]]
        assert run["processor"] in content["processors"]
        assert (record.config.mixture, record.config.learning_rate) == (content["mixture"], run["rate"])
        assert record.mean() == pytest.approx(run["published"], abs=1e-3)
