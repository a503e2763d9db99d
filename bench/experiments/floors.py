"""Tasks at floor: those that a LoRA trained on them alone does not learn.

The rule is that of docs/notes/protocol-2026-12-01.md. Single-task runs of LoRA are validated on their task, at one
learning rate and, if they fail there, at the next. A task is learned if the better run beats chance by more than three
standard errors. Tasks without such a run count as learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.experiments.profiles import TUNING_SEED
from bench.records.schema import Record, RunConfig

FLOOR_METHOD = "lora"
FLOOR_RATES = (6e-4, 9e-4)
STANDARD_ERRORS = 3
# Fields in which a single-task run may differ from the runs of the mixture.
_FREE = ("method", "method_options", "mixture", "seed", "learning_rate", "data_hash", "scorer_versions")


@dataclass(frozen=True)
class Floor:
    """The validation score of a single-task run, and chance.

    Attributes:
        value: Accuracy, or balanced accuracy where the classes of the test set are uneven; from 0 to 1.
        error: Standard error of the accuracy.
        chance: Score of a guess: the larger of that of a random choice and that of always choosing the class that is
            the most frequent one in training. For balanced accuracy it is that of a random choice.
    """

    task: str
    rate: float
    value: float
    error: float
    chance: float

    @property
    def is_learned(self) -> bool:
        """True if the score is above chance by more than three standard errors."""
        return self.value - self.chance > STANDARD_ERRORS * self.error


def floors(records: Iterable[Record]) -> list[Floor]:
    """Return the better single-task run of each task, in the order of the records.

    Args:
        records: Records of single-task runs; others are ignored.
    """
    best: dict[str, Floor] = {}
    for record in records:
        if (found := _floor(record)) and (found.task not in best or found.value > best[found.task].value):
            best[found.task] = found
    return list(best.values())


def single_task_runs(records: Iterable[Record], like: RunConfig) -> list[Record]:
    """Return the runs of single tasks of a run's mixture, with its settings."""
    expected, suite = like.config_key_without(*_FREE), f"{like.mixture.partition('/')[0]}/"
    return [
        record
        for record in records
        if record.config.mixture.startswith(suite) and record.config.config_key_without(*_FREE) == expected
    ]


def tasks_at_floor(records: Iterable[Record], like: RunConfig) -> set[str]:
    """Return the tasks of a run's mixture that are not learned.

    Args:
        records: All records, with those of single tasks.
        like: Configuration of a run of the mixture.
    """
    return {floor.task for floor in floors(single_task_runs(records, like)) if not floor.is_learned}


def _floor(record: Record) -> Floor | None:
    config = record.config
    is_one = config.method == FLOOR_METHOD and config.seed == TUNING_SEED and config.learning_rate in FLOOR_RATES
    if not (is_one and record.status == "ok" and record.validation and len(record.validation) == 1 and record.test):
        return None
    ((task, score),) = record.validation.items()
    if score.guess is None or score.stderr is None or task not in record.test:
        return None
    chance, value = float(score.guess), float(score.value)
    train = (record.data.train or {}).get(task) if record.data else None
    if record.test[task].is_uneven and score.balanced is not None:
        value = float(score.balanced)
    elif train and train.largest_class is not None:
        chance = max(chance, float(train.largest_class))
    assert config.learning_rate is not None, "it is one of FLOOR_RATES"
    return Floor(task, float(config.learning_rate), value, float(score.stderr), chance)
