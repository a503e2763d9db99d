"""The rule that tells which tasks are at floor."""

import pytest

from bench.experiments.floors import floors, tasks_at_floor
from bench.experiments.profiles import TUNING_SEED
from bench.records.schema import TaskScore
from tests.bench.records.test_store import make


def alone(value, rate=6e-4, balanced=None, largest_class=None, uneven=False, seed=TUNING_SEED, task="lexicon"):
    one = make(seed, rate=rate)
    score = TaskScore(metric="acc", value=value, stderr=0.02, n=500, version=2, loss=1, label_tokens=500, guess=0.25)
    data = one.data.replace(train={task: {"examples": 9, "tokens": 9, "label_tokens": 9}})
    if largest_class:
        data = data.replace(train={task: data.train[task].replace(largest_class=largest_class)})
    test = score.replace(classes=4, largest_class=0.5 if uneven else 0.26, balanced=0.5)
    return one.replace(
        config=one.config.replace(mixture=f"procedural/{task}"),
        data=data,
        validation={task: score if balanced is None else score.replace(balanced=balanced)},
        test={task: test},
    )


@pytest.mark.parametrize(
    "run, chance, is_learned",
    [
        (alone(0.32), 0.25, True),
        (alone(0.30), 0.25, False),
        (alone(0.50, largest_class=0.45), 0.45, False),
        (alone(0.52, largest_class=0.45), 0.45, True),
        (alone(0.80, largest_class=0.79, balanced=0.32, uneven=True), 0.25, True),
        (alone(0.90, balanced=0.30, uneven=True), 0.25, False),
        (alone(0.90, balanced=0.30), 0.25, True),  # even classes: accuracy counts
    ],
)
def test_a_task_is_learned_if_it_beats_chance_by_three_standard_errors(run, chance, is_learned):
    (floor,) = floors([run])
    assert (floor.chance, floor.is_learned) == (chance, is_learned)


def test_the_better_run_counts_and_others_are_ignored():
    runs = [alone(0.3), alone(0.6, rate=9e-4), alone(0.9, seed=0), alone(0.9, rate=2e-3), make(TUNING_SEED, rate=6e-4)]
    (floor,) = floors(runs)
    assert (floor.value, floor.rate) == (0.6, 9e-4)


def test_tasks_at_floor_are_those_of_the_same_mixture_and_settings():
    like = make(0).config
    runs = [alone(0.26), alone(0.9, task="majority"), make(0)]
    assert tasks_at_floor(runs, like) == {"lexicon"}
    assert (
        tasks_at_floor(runs, like.replace(format="cloze"))
        == set()
        == tasks_at_floor(runs, like.replace(mixture="intra"))
    )
