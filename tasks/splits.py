"""Rules that split a data set into train, validation and test.

`SplitRule` is for data that is published in one file, `HeldOut` for sets of a fixed size.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SplitRule:
    """Shares of the splits, and a seed.

    The split of an item follows from the seed and the item's question alone. It depends neither on the order of the
    file nor on the other items: an item stays in its split when the file grows. Items with equal questions are in the
    same split, so that no test question is trained on. The sizes are therefore close to the shares, not equal to them.

    Attributes:
        validation: Share of the validation items, between 0 and 1.
        test: Share of the test items, between 0 and 1. The rest is trained on.
        seed: Another seed makes another split.

    Raises:
        ValueError: A share is not above 0, or none is left to train on.
    """

    validation: float = 0.1
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise ValueError(
                f"the shares validation={self.validation} and test={self.test} must be above 0, and their sum below 1"
            )

    def split_of(self, key: str) -> str:
        """Return the split of an item: train, validation or test.

        Args:
            key: The item's normalized question, `Item.key`.
        """
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


@dataclass(frozen=True)
class HeldOut:
    """Sizes of the test and the validation set, which are drawn once.

    A published set that is larger is sampled, and its other items are not used. One that is smaller or missing is taken
    whole, and the rest is held out of training.

    Attributes:
        test: Items of the test set.
        validation: Items of the validation set.
        seed: Seed of the draw, which does not depend on a run's seed.
    """

    test: int
    validation: int
    seed: int = 0

    def draw(self, published: Mapping[str, Sequence[T]]) -> dict[str, list[T]]:
        """Return the items of the splits train, validation and test, each in the published order.

        Args:
            published: Items by split: train, and perhaps validation and test.

        Raises:
            ValueError: Too few items are left for training.
        """
        drawn: dict[str, list[T]] = {}
        train = list(published["train"])
        for split, size in (("test", self.test), ("validation", self.validation)):
            items = published.get(split, [])
            chosen, _ = split_off(items, min(size, len(items)), self.seed)
            missing = size - len(chosen)
            if missing >= len(train):
                raise ValueError(f"of {len(train)} training items {missing} are to be held out for {split}")
            more, train = split_off(train, missing, self.seed)
            drawn[split] = chosen + more
        return {"train": train, **drawn}


def split_off(items: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Draw items at random. Return them and the others, both in their order."""
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return [item for i, item in enumerate(items) if i in chosen], [x for i, x in enumerate(items) if i not in chosen]
