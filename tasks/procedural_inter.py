"""The tiny profile's inter-domain mixture: two of its multiple-choice tasks and two with written answers.

The base model has learned to count and to repeat. Here it must stop counting at a given number, and put three facts
into another order. The words come from `tasks.procedural`, which is hashed into the base model and must not change.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tasks.base import DataRef, Exercise, Task, Writing
from tasks.metrics import LAST_NUMBER, ROUGE_L
from tasks.procedural import NAMES, OBJECTS, PLACES


def counting(rng: random.Random) -> Exercise:
    """Draw an exercise to count from one number to another; the last number is scored."""
    first, count, name = rng.randrange(1, 24), rng.randint(2, 6), rng.choice(NAMES)
    answer = [str(first + step) for step in range(count + 1)]
    return Exercise(f"{name} has {answer[0]} first , {answer[-1]} last , say it .", " ".join(answer), (answer[-1],))


def report(rng: random.Random) -> Exercise:
    """Draw an exercise to put attributes into a sentence; one of two wordings is learned, and both are correct."""
    name, thing, place = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES)
    wordings = (f"{name} has the {thing} in the {place} .", f"in the {place} {name} has the {thing} .")
    return Exercise(f"name {name} , object {thing} , place {place}", rng.choice(wordings), wordings)


WRITERS: dict[str, Callable[[random.Random], Exercise]] = {"counting": counting, "report": report}

_GENERATION = {
    # The longest answers have seven numbers or eight words. The limits are higher, to catch answers that go on.
    "counting": Writing(LAST_NUMBER, max_new_tokens=12),
    "report": Writing(ROUGE_L, max_new_tokens=16),
}
_SPLITS = {"train": "train", "test": "test"}
PROCEDURAL_WRITTEN = tuple(
    Task(name, name, lambda record: Exercise(**record), DataRef(name, hub=""), _SPLITS, writing)
    for name, writing in _GENERATION.items()
)
