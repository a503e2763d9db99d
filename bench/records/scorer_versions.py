"""Versions of the scorer, and what changed with each.

A score's version tells if scores can be compared. It belongs to the score and not to the scorer as a whole, because a
change rarely concerns all tasks: records of the others stay comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A change of the scorer that may change scores.

    Attributes:
        version: Version of the scores made since.
        concerns: Name of the metric or of the task whose scores change; None for all.
        text: What changed, as the end of a sentence.
    """

    version: int
    concerns: str | None
    text: str


CHANGES = (
    # Of 9,156 items of the small profile's base, one answer changed.
    Change(2, None, "the output layer runs in float32, so that two choices do not tie in bfloat16"),
    Change(3, "acc_norm", "the blank before a choice no longer counts as one of its characters, as in lm-eval's tasks"),
    Change(3, "gsm8k", "the last number of an answer is read in any spelling"),
    Change(3, "e2e", "line breaks before an answer no longer end it"),
)
UNNAMED = 2  # the version of all scores of a run whose configuration names none


def scorer_version(task: str, metric: str) -> int:
    """Return today's version of a task's scores by this metric."""
    return max(change.version for change in _changes_of(task, metric))


def named_versions(metrics: Mapping[str, str]) -> dict[str, int] | None:
    """Return the versions by task that a run's configuration names, or None if there are none.

    Args:
        metrics: Metric by task.
    """
    versions = {task: scorer_version(task, metric) for task, metric in sorted(metrics.items())}
    return {task: version for task, version in versions.items() if version > UNNAMED} or None


def changes_since(task: str, metric: str, version: int) -> list[str]:
    """Return what has changed since a score of this version was made."""
    return [change.text for change in _changes_of(task, metric) if change.version > version]


def _changes_of(task: str, metric: str) -> list[Change]:
    return [change for change in CHANGES if change.concerns in (None, task, metric)]
