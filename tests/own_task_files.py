"""Files of tasks of one's own, in the words that the tiny base model knows."""

import json
import random
from pathlib import Path

from tasks.procedural import NAMES, OBJECTS, PLACES


def write(path: Path, records: list[dict]) -> Path:
    """Write records as JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def questions(count: int = 60) -> list[dict]:
    """Return records with choices, each with another question."""
    rng = random.Random(0)
    drawn = [(n, o, p) for n in NAMES for o in OBJECTS for p in PLACES]
    records = []
    for name, thing, place in rng.sample(drawn, count):
        choices = rng.sample([place, next(p for p in PLACES if p != place)], 2)
        context = f"{name} saw the {thing} near the {place} ."
        records.append({"context": context, "question": f"near what is {thing} ?", "choices": choices, "answer": place})
    return records


def prompts(count: int = 60) -> list[dict]:
    """Return records with written answers, each with two references."""
    rng = random.Random(1)
    drawn = rng.sample([(n, o, p) for n in NAMES for o in OBJECTS for p in PLACES], count)
    return [
        {
            "prompt": f"name {name} , object {thing} , place {place}",
            "answer": f"{name} has the {thing} in the {place} .",
            "references": [f"{name} has the {thing} in the {place} .", f"in the {place} {name} has the {thing} ."],
        }
        for name, thing, place in drawn
    ]
