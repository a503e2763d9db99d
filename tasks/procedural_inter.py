"""The `tiny` profile's stand-in for the inter-domain mixture: two of its kinds of question, and two that are written.

The base has learned to count and to repeat; here it must count as far as asked and no further, and say three facts in
another order. Words are those of `tasks.procedural`, which stays as it is: the base model is made from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tasks.base import LAST_NUMBER, ROUGE_L, DataRef, Exercise, Task, Writing
from tasks.procedural import NAMES, OBJECTS, PLACES


def counting(rng: random.Random) -> Exercise:
    """Numbers to be written out up to one that is given, which is the last and the answer."""
    first, count, name = rng.randrange(1, 24), rng.randint(2, 6), rng.choice(NAMES)
    answer = [str(first + step) for step in range(count + 1)]
    return Exercise(f"{name} has {answer[0]} first , {answer[-1]} last , say it .", " ".join(answer), (answer[-1],))


def report(rng: random.Random) -> Exercise:
    """Attributes to be put into a sentence, for which there are two ways; one is learned, either is right."""
    name, thing, place = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES)
    ways = (f"{name} has the {thing} in the {place} .", f"in the {place} {name} has the {thing} .")
    return Exercise(f"name {name} , object {thing} , place {place}", rng.choice(ways), ways)


WRITERS: dict[str, Callable[[random.Random], Exercise]] = {"counting": counting, "report": report}

_SCORING = {
    # Seven numbers or eight words at most; more, so that going on too long is seen.
    "counting": Writing(LAST_NUMBER, max_new_tokens=12),
    "report": Writing(ROUGE_L, max_new_tokens=16),
}
PROCEDURAL_WRITTEN = tuple(
    Task(name, name, lambda record: Exercise(**record), DataRef(name, hub=""), {"train": "train", "test": "test"}, how)
    for name, how in _SCORING.items()
)
