"""Scores of a task, and the losses of its items that they follow from."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from bench.records.section import Integer, Number, Section

# Balanced accuracy is reported where the largest class has more than this many times the items of an even split.
MAX_UNEVENNESS = 1.2


class TaskScore(Section):
    """A task's score. Older records have the first five fields only.

    Attributes:
        value: Mean of the items, from 0 to 1.
        stderr: Standard error of the mean; None for a single item.
        n: Number of items.
        version: Version of the scorer.
        loss: Negative log-likelihood of the correct answers in nats per label token: the sum over the items divided by
            the sum of their label tokens.
        label_tokens: Label tokens of all correct answers.
        guess: Share of items that a random choice gets right; None for generated answers.
        classes: Number of classes that the items have; None for a task without classes, as the two below.
        largest_class: Share of the items that are of the largest class.
        balanced: Balanced accuracy, the mean recall of the classes.
    """

    metric: str
    value: Number = Field(ge=0, le=1)
    stderr: Number | None
    n: Integer
    version: Integer
    loss: Number | None = Field(default=None, ge=0)
    label_tokens: Integer | None = None
    guess: Number | None = None
    classes: Integer | None = None
    largest_class: Number | None = None
    balanced: Number | None = Field(default=None, ge=0, le=1)

    @property
    def is_uneven(self) -> bool:
        """True if balanced accuracy replaces accuracy, because the classes have unlike numbers of items."""
        return bool(self.classes and self.largest_class and self.largest_class * self.classes > MAX_UNEVENNESS)


class GoldAnswers(Section):
    """The correct answers of a task's items, in the order of the items.

    Attributes:
        nats: Negative log-likelihood of the whole answer.
        label_tokens: Number of the answer's tokens.
        classes: Number of the answer's class from 0; None for a task without classes.
    """

    nats: list[Number]
    label_tokens: list[Integer]
    classes: list[Integer] | None = None

    def summary(self, outcomes: Sequence[Number]) -> dict[str, Any]:
        """Return the fields of `TaskScore` that follow from these answers.

        Args:
            outcomes: Outcomes of the items, 1 right and 0 wrong.
        """
        tokens = sum(self.label_tokens)
        found: dict[str, Any] = {"loss": math.fsum(self.nats) / tokens, "label_tokens": tokens}
        if self.classes is not None:
            sizes = Counter(self.classes)
            weights = self.class_weights()
            assert weights is not None, "there are classes"
            found |= {
                "classes": len(sizes),
                "largest_class": max(sizes.values()) / len(self.classes),
                # rounding may exceed 1 by its last digit
                "balanced": min(1.0, math.fsum(map(operator.mul, weights, outcomes)) / len(outcomes)),
            }
        return found

    def class_weights(self) -> list[float] | None:
        """Return a weight for each item: the mean of the weighted outcomes is the balanced accuracy.

        Returns None for a task without classes.
        """
        if self.classes is None:
            return None
        sizes = Counter(self.classes)
        return [len(self.classes) / (len(sizes) * sizes[number]) for number in self.classes]
