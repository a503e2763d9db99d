"""What a task is: items in three splits, a prompt format, and the examples that follow.

An item is what its authors published: a `Question` with choices, or an `Exercise` whose answer is written. A prompt
format turns it into an `Example`, the text that is trained on and scored. Training and lm-eval read the same examples,
so a model is never asked in words that it did not learn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from tasks.errors import DataError


class _Item:
    @property
    def key(self) -> str:
        """Letters and digits of what is asked: two items with one key are the same question."""
        asked = f"{self.context} {self.text} {getattr(self, 'lead', '')}"
        return re.sub(r"[^a-z0-9]+", " ", asked.lower()).strip()


@dataclass(frozen=True)
class Question(_Item):
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


@dataclass(frozen=True)
class Exercise(_Item):
    """One item whose answer is written.

    Attributes:
        text: what is asked.
        answer: what is learned.
        references: what the task's metric holds an answer against, see `Writing`; empty where only training reads it.
        context: what must be read first, or "".
        lead: how the answer begins; it is given, and neither learned nor scored.
    """

    text: str
    answer: str
    references: tuple[str, ...] = ()
    context: str = ""
    lead: str = ""


Item = Question | Exercise


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


@dataclass(frozen=True)
class WrittenExample(Example):
    """An exercise as text: its one choice is the answer to learn, after which the text ends."""

    references: tuple[str, ...] = ()


def letters(task: str, question: Question) -> Example:
    """The choices stand in the prompt, the label is the letter of the right one: one token in most vocabularies."""
    names = "ABCDEFGHIJ"[: len(question.choices)]
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(names, question.choices, strict=True))
    return Example(task, f"{_opening(question)}\n{listed}\nAnswer:", tuple(f" {n}" for n in names), question.answer)


def cloze(task: str, question: Question) -> Example:
    """The choices are not shown; each is read as a continuation, and the likeliest by its length wins."""
    return Example(task, f"{_opening(question)}\nAnswer:", tuple(f" {c}" for c in question.choices), question.answer)


def written(task: str, exercise: Exercise) -> WrittenExample:
    """The one template of everything that is written, whatever the format of choices: theirs, without choices."""
    prompt = f"{_opening(exercise)}\nAnswer:{exercise.lead}"
    return WrittenExample(task, prompt, (f" {exercise.answer}",), 0, exercise.references)


def _opening(item: Item) -> str:
    passage = f"Passage: {item.context}\n" if item.context else ""
    return f"{passage}Question: {item.text}"


FORMATS: dict[str, Callable[[str, Question], Example]] = {"letters": letters, "cloze": cloze}


@dataclass(frozen=True)
class DataRef:
    """Where a data set's records are: `{file}_{split}.jsonl.gz` in a folder, or `hub` (and `config`) on the hub.

    `hub` is "" for what the hub does not have; `hub_splits` are the hub's names of splits that the folder's files name
    otherwise.
    """

    file: str
    hub: str
    config: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Reads the records of a published split."""

    def read(self, ref: DataRef, split: str) -> list[dict]: ...


# How a written answer is scored, and what its references are: the share of programs that pass their tests (how the
# program begins, its tests), the last number in the answer (that number), ROUGE-L F against the best (the texts).
PASS, LAST_NUMBER, ROUGE_L = "pass@1", "exact_match", "rougeL"
LIKELIHOOD = "likelihood"  # the geometric mean probability of the label's tokens


@dataclass(frozen=True)
class Writing:
    """How an answer is written: by greedy decoding, up to so many tokens or to the first of the stop strings."""

    metric: str
    max_new_tokens: int
    stop: tuple[str, ...] = ("\nQuestion:", "\nPassage:")  # a model that was not trained goes on with another item


@dataclass(frozen=True)
class Task:
    """A data set and what is asked of it.

    Attributes:
        name: as in commands and records.
        title: as in tables.
        question: turns a record, as the hub or a folder gives it, into an item; None leaves the record out.
        data: where the records are.
        published: our splits to the publisher's. Where the test has no published labels the published validation
            split is the test, and validation is missing here: it is then a seeded part of train.
        writing: how its answers are written; None where they are chosen.
    """

    name: str
    title: str
    question: Callable[[dict], Item | None]
    data: DataRef
    published: dict[str, str]
    writing: Writing | None = None

    @property
    def metric(self) -> str | None:
        """None where it follows from the prompt format."""
        return self.writing.metric if self.writing else None

    def load(self, source: Source) -> dict[str, list[Item]]:
        """Items by split.

        Raises:
            DataError: a record that `question` cannot read.
        """
        splits = {ours: self.read(source, ours) for ours in self.published}
        if "validation" not in splits:
            splits["train"], splits["validation"] = _hold_out(splits["train"], HELD_OUT)
        return splits

    def read(self, source: Source, split: str) -> list[Item]:
        """The items of one of our splits; raises as `load`."""
        items = self._read(source, self.published[split])
        return _once(items) if self.writing and split == "test" else items

    def _read(self, source: Source, split: str) -> list[Item]:
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
# A likelihood varies less between items than right and wrong do, and its labels are long.
HELD_OUT_OF_DOMAIN = 150


@dataclass(frozen=True)
class Domain:
    """Data sets that are trained on as one. What is held out of them is scored by the likelihood of the answers.

    Attributes:
        name: as in commands and records.
        title: as in tables.
        parts: the data sets, for their train splits.
        tests: names of the tasks that ask what this domain teaches.
    """

    name: str
    title: str
    parts: tuple[Task, ...]
    tests: tuple[str, ...]
    metric: str = LIKELIHOOD

    def load(self, source: Source) -> dict[str, list[Item]]:
        """Items by split: train and validation; raises as `Task.load`."""
        items = [item for part in self.parts for item in part.read(source, "train")]
        return dict(zip(("train", "validation"), _hold_out(items, HELD_OUT_OF_DOMAIN), strict=True))


def _hold_out(items: list[Item], most: int) -> tuple[list[Item], list[Item]]:
    """Train and validation. The cut is fixed, not the run's: rates are tuned on the same items for every seed."""
    held = set(random.Random(0).sample(range(len(items)), min(most, len(items) // 10)))
    return [q for i, q in enumerate(items) if i not in held], [q for i, q in enumerate(items) if i in held]


def _once(exercises: list[Exercise]) -> list[Exercise]:
    """Each question once, with the references of all its records."""
    alike: dict[tuple, list[Exercise]] = {}
    for exercise in exercises:
        alike.setdefault((exercise.context, exercise.text, exercise.lead), []).append(exercise)
    return [replace(same[0], references=tuple(r for e in same for r in e.references)) for same in alike.values()]
