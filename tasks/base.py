"""What a task is: questions in three splits, a prompt format, and the examples that follow.

A `Question` is an item as its authors published it. A prompt format turns it into an `Example`,
the text that is trained on and scored. Training and lm-eval read the same examples, so a model is
never asked in words that it did not learn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Question:
    """One multiple-choice item.

    Attributes:
        text: the question.
        choices: the answers to choose from, two or more.
        answer: index into `choices`.
        context: what must be read first (BoolQ's passage), or "".
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} is not one of {len(self.choices)} choices: {self.text[:60]!r}")

    @property
    def key(self) -> str:
        """Letters and digits of context and question: two questions with one key are the same question."""
        return re.sub(r"[^a-z0-9]+", " ", f"{self.context} {self.text}".lower()).strip()


@dataclass(frozen=True)
class Example:
    """A question as text: the model reads `prompt` and should prefer `choices[answer]` as what follows."""

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def label(self) -> str:
        return self.choices[self.answer]


def letters(task: str, question: Question) -> Example:
    """The choices stand in the prompt, the label is the letter of the right one: one token in most vocabularies."""
    names = "ABCDEFGHIJ"[: len(question.choices)]
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(names, question.choices, strict=True))
    return Example(task, f"{_opening(question)}\n{listed}\nAnswer:", tuple(f" {n}" for n in names), question.answer)


def cloze(task: str, question: Question) -> Example:
    """The choices are not shown; each is read as a continuation, and the likeliest by its length wins."""
    return Example(task, f"{_opening(question)}\nAnswer:", tuple(f" {c}" for c in question.choices), question.answer)


def _opening(question: Question) -> str:
    passage = f"Passage: {question.context}\n" if question.context else ""
    return f"{passage}Question: {question.text}"


FORMATS: dict[str, Callable[[str, Question], Example]] = {"letters": letters, "cloze": cloze}


class DataError(ValueError):
    """Data that a task needs is missing or broken; the message says what, where and what to do."""


@dataclass(frozen=True)
class DataRef:
    """Where a data set's records are: `{file}_{split}.jsonl.gz` in a folder, or `hub` (and `config`) on the hub."""

    file: str
    hub: str
    config: str | None = None


class Source(Protocol):
    """Reads the records of a published split."""

    def read(self, ref: DataRef, split: str) -> list[dict]: ...


@dataclass(frozen=True)
class Task:
    """A data set and what is asked of it.

    Attributes:
        name: as in commands and records.
        title: as in tables.
        question: turns a record, as the hub or a folder gives it, into a Question; None leaves the record out.
        data: where the records are.
        published: our splits to the publisher's. Where the test has no published labels the published validation
            split is the test, and validation is missing here: it is then a seeded part of train.
    """

    name: str
    title: str
    question: Callable[[dict], Question | None]
    data: DataRef
    published: dict[str, str]

    def load(self, source: Source) -> dict[str, list[Question]]:
        """Questions by split.

        Raises:
            DataError: a record that `question` cannot read.
        """
        splits = {ours: self._read(source, theirs) for ours, theirs in self.published.items()}
        if "validation" not in splits:
            splits["train"], splits["validation"] = _hold_out(splits["train"])
        return splits

    def _read(self, source: Source, split: str) -> list[Question]:
        questions = []
        for number, record in enumerate(source.read(self.data, split)):
            try:
                question = self.question(record)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(
                    f"{self.data.file}_{split}, record {number}: not a {self.title} item ({error!r}); "
                    "fetch the file again, or see tasks/ for the fields it should have."
                ) from error
            if question is not None:
                questions.append(question)
        return questions


# Enough for a standard error of 2 points on a task, and a small share of the train splits it is taken from.
HELD_OUT = 500


def _hold_out(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Train and validation. The cut is fixed, not the run's: rates are tuned on the same items for every seed."""
    size = min(HELD_OUT, len(questions) // 10)
    held = set(random.Random(0).sample(range(len(questions)), size))
    return (
        [q for i, q in enumerate(questions) if i not in held],
        [q for i, q in enumerate(questions) if i in held],
    )
