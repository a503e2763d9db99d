"""GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168), scored by the last number written."""

from __future__ import annotations

import re

from tasks.base import LAST_NUMBER, DataRef, Exercise, Task, Writing


def question(record: dict) -> Exercise:
    """The marks for a calculator, which nobody here reads, are taken out of the solution."""
    solution = re.sub(r"<<.*?>>", "", record["answer"])
    return Exercise(record["question"].strip(), solution, (solution.rpartition("####")[2].strip(),))


GSM8K = Task(
    "gsm8k",
    "GSM8K",
    question,
    DataRef("gsm8k", "openai/gsm8k", "main"),
    {"train": "train", "test": "test"},
    Writing(LAST_NUMBER, max_new_tokens=256),  # of 100 solutions to train on, 99 have fewer than 220 SmolLM2 tokens
)
