"""A rule that splits a data set in one file into train, validation and test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


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
