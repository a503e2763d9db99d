"""Tasks, their items in three splits, and the prompt formats.

An item is one published record: a `Question` with choices, or an `Exercise` with a free-text answer. A prompt format
turns an item into an `Example`, the text for training and scoring. Training and lm-eval read the same examples, so a
model is evaluated on exactly the prompts it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from tasks.errors import DataError
from tasks.fields import Record as Record  # data sets import it from here
from tasks.fields import require_filled, require_text
from tasks.keys import letters_and_digits, normalize
from tasks.metrics import LIKELIHOOD
from tasks.splits import HeldOut, SplitRule, split_off


@dataclass(frozen=True)
class Question:
    """A multiple-choice item.

    Attributes:
        text: The question.
        choices: The possible answers, two or more.
        answer: Index of the correct answer in `choices`.
        context: A text to read before the question (BoolQ's passage), or "".
        label_name: For a text to classify, the name of its label in the prompt ("Topic"); "" for a question.

    Raises:
        ValueError: A field has another type, the question or a choice is empty, or `answer` is not an index of
            `choices`.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""
    label_name: str = ""

    def __post_init__(self) -> None:
        require_filled("the question", self.text)
        require_text("the context", self.context)
        for number, choice in enumerate(self.choices):
            require_filled(f"choice {number}", choice)
        if len(self.choices) < 2:
            raise ValueError(f"there are {len(self.choices)} choices, and a question needs two: {self.text[:60]!r}")
        if (
            not isinstance(self.answer, int)
            or isinstance(self.answer, bool)
            or not 0 <= self.answer < len(self.choices)
        ):
            raise ValueError(f"answer {self.answer!r} is not one of {len(self.choices)} choices: {self.text[:60]!r}")

    @property
    def key(self) -> str:
        """The normalized question; items with equal keys are duplicates."""
        text = f"{self.context} {self.text}"
        return letters_and_digits(text) if self.label_name else normalize(text)


@dataclass(frozen=True)
class Exercise:
    """An item with a free-text answer.

    Attributes:
        text: The question or instruction.
        answer: The answer to learn.
        references: The data for the task's metric, see `tasks.metrics`. Empty for items that are only trained on.
        context: A text to read before the question, or "".
        lead: The start of the answer. It is part of the prompt, so it is neither learned nor scored.

    Raises:
        ValueError: A field has another type, or the text, the answer or a reference is empty.
    """

    text: str
    answer: str
    references: tuple[str, ...] = ()
    context: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        require_filled("the question", self.text)
        require_filled("the answer", self.answer)
        for reference in self.references:
            require_filled("a reference", reference)
        require_text("the context", self.context)
        require_text("the start of the answer", self.lead)

    @property
    def key(self) -> str:
        """The normalized question; items with equal keys are duplicates."""
        return normalize(f"{self.context} {self.text} {self.lead}")


Item = Question | Exercise


@dataclass(frozen=True)
class Example:
    """A formatted question: after `prompt` the model should prefer `choices[answer]`."""

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def label(self) -> str:
        """The correct continuation of the prompt."""
        return self.choices[self.answer]


@dataclass(frozen=True)
class WrittenExample(Example):
    """A formatted exercise with the answer to learn as its only choice.

    The text ends after the answer.
    """

    references: tuple[str, ...] = ()


LETTERS = "ABCDEFGHIJ"


def letters(task: str, question: Question) -> Example:
    """Format a question with lettered choices in the prompt.

    The label is the letter of the correct choice, one token in most vocabularies.

    Raises:
        DataError: The question has more choices than there are letters for them.
    """
    if len(question.choices) > len(LETTERS):
        raise DataError(
            f"{task}: a question has {len(question.choices)} choices, and the format letters has names for "
            f"{len(LETTERS)} only; use --format cloze ({question.text[:60]!r})."
        )
    names = LETTERS[: len(question.choices)]
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(names, question.choices, strict=True))
    prompt = f"{_opening(question)}\n{listed}\n{question.label_name or 'Answer'}:"
    return Example(task, prompt, tuple(f" {n}" for n in names), question.answer)


def cloze(task: str, question: Question) -> Example:
    """Format a question without its choices.

    Each choice is scored as a continuation of the prompt, by its likelihood. A text to classify is the text, a line
    break and the name of its label.
    """
    prompt = f"{_opening(question)}\n{question.label_name or 'Answer'}:"
    return Example(task, prompt, tuple(f" {c}" for c in question.choices), question.answer)


def written(task: str, exercise: Exercise) -> WrittenExample:
    """Format an exercise; all prompt formats share this template."""
    prompt = f"{_opening(exercise)}\nAnswer:{exercise.lead}"
    return WrittenExample(task, prompt, (f" {exercise.answer}",), 0, exercise.references)


def _opening(item: Item) -> str:
    passage = f"Passage: {item.context}\n" if item.context else ""
    return passage + (item.text if isinstance(item, Question) and item.label_name else f"Question: {item.text}")


FORMATS: dict[str, Callable[[str, Question], Example]] = {"letters": letters, "cloze": cloze}


@dataclass(frozen=True)
class DataRef:
    """The location of a data set.

    Attributes:
        file: Stem of its files in a folder: `{file}_{split}.jsonl.gz`.
        hub: Id on the Hugging Face hub, or "" for data that is not there.
        config: Name of the configuration on the hub.
        hub_splits: Maps the names of splits in a folder to the hub's names, for splits whose names differ.
    """

    file: str
    hub: str
    config: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """A reader of published records."""

    def read(self, ref: DataRef, split: str) -> list[Record]:
        """Return the records of a published split.

        Raises:
            DataError: The split is missing or broken.
        """
        ...

    def locate(self, ref: DataRef, split: str, number: int) -> str:
        """Return the place of a record, numbered from 0, for an error message."""
        ...


@dataclass(frozen=True)
class Writing:
    """The generation settings of a task with free-text answers. Decoding is greedy.

    Attributes:
        metric: Name of the metric, one of `tasks.metrics`.
        max_new_tokens: Maximum length of an answer.
        stop: Strings that end an answer. An untrained model often goes on to the next question by itself.
    """

    metric: str
    max_new_tokens: int
    stop: tuple[str, ...] = ("\nQuestion:", "\nPassage:")


@dataclass(frozen=True)
class Task:
    """A data set and the way it is scored.

    Attributes:
        name: Name in commands and records.
        title: Name in tables.
        parse_record: Turns a record, from the hub or from a folder, into an item. None drops the record.
        data: Location of the records.
        published: Maps our split names to the publisher's. If the test labels are unpublished, our test split is the
            published validation split, and our validation split is a fixed random sample of train.
        writing: Generation settings of a task with free-text answers, None for a task with choices.
        may_repeat_choices: The published records have questions with two equal choices. They are kept as published. In
            other data sets equal choices are an error, because only one of them would be correct.
        split_rule: Splits the published split by this rule, if the publisher has one only. Then `published` maps all
            our splits to it.
        held_out: Draws validation and test sets of these sizes; None for the published sets.
        dropped_texts: A task, and published splits of it whose texts no split of this task may have; None for all
            texts.
        drops_repeats: Whether training keeps only the first of items with the same text.
        has_classes: Whether the choices are classes: the same for all items, or for all items of a group.
        source: Reader of the task's own files; None for the run's source.
        fingerprint: Hash of the records and settings of a task that has its own files, else "".
    """

    name: str
    title: str
    parse_record: Callable[[Record], Item | None]
    data: DataRef
    published: dict[str, str]
    writing: Writing | None = None
    may_repeat_choices: bool = False
    split_rule: SplitRule | None = None
    held_out: HeldOut | None = None
    dropped_texts: tuple[Task, tuple[str, ...]] | None = None
    drops_repeats: bool = False
    has_classes: bool = False
    source: Source | None = None
    fingerprint: str = ""

    @property
    def metric(self) -> str | None:
        """Name of the metric, or None if it follows from the prompt format."""
        return self.writing.metric if self.writing else None

    def load(self, source: Source) -> dict[str, list[Item]]:
        """Return the items of all splits.

        Raises:
            DataError: A file is missing or broken, or `parse_record` cannot read a record.
        """
        source = self.source or source
        parsed = {name: self._parse(source, name) for name in dict.fromkeys(self.published.values())}
        unwanted = self._unwanted_keys(source)
        splits = {split: self._select(parsed[name], split, unwanted) for split, name in self.published.items()}
        if self.held_out:
            splits = self._hold_out(splits, self.held_out)
        elif "validation" not in splits:
            splits["train"], splits["validation"] = self._split_off_validation(splits["train"])
        if self.drops_repeats:
            splits["train"] = list({item.key: item for item in reversed(splits["train"])}.values())[::-1]
        return splits

    def _hold_out(self, splits: dict[str, list[Item]], sizes: HeldOut) -> dict[str, list[Item]]:
        try:
            return sizes.draw(splits)
        except ValueError as error:
            raise DataError(f"{self.title}: {error}; fetch its files again.") from error

    def _split_off_validation(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        train, validation = _split_off_validation(items, MAX_VALIDATION_ITEMS)
        if not validation:
            raise DataError(
                f"{self.title} has {len(items)} training items, and at least 10 are needed to hold one out for "
                "validation; add more, or a file of validation items."
            )
        return train, validation

    def read(self, source: Source, split: str) -> list[Item]:
        """Return the items of one of our splits.

        Raises:
            DataError: The file is missing or broken, or `parse_record` cannot read a record.
        """
        if self.held_out:
            return self.load(source)[split]
        source = self.source or source
        return self._select(self._parse(source, self.published[split]), split, self._unwanted_keys(source))

    def _unwanted_keys(self, source: Source) -> set[str]:
        other, published_splits = self.dropped_texts or (self, ())
        return {item.key for name in published_splits for item in other._parse(source, name)}

    def _select(self, items: list[Item], split: str, unwanted: set[str]) -> list[Item]:
        """Return the items of a published split that belong to one of our splits."""
        if unwanted:
            items = [item for item in items if item.key not in unwanted]
        if self.split_rule:
            total, items = len(items), [item for item in items if self.split_rule.split_of(item.key) == split]
            if not items:
                raise DataError(
                    f"{self.title}: none of its {total} items is in the {split} split of {self.split_rule}; add items "
                    "with different questions, raise a share or choose another seed."
                )
        return _merge_references(items) if self.writing and split == "test" else items

    def _parse(self, source: Source, published_split: str) -> list[Item]:
        items: list[Item] = []
        for number, record in enumerate(source.read(self.data, published_split)):
            try:
                item = self.parse_record(record)
                if isinstance(item, Question) and not self.may_repeat_choices:
                    _require_different(item.choices)
                if isinstance(item, Exercise) and not item.references and published_split == self.published.get("test"):
                    raise ValueError("the item has no reference to score an answer with")
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                problem = " ".join((str(error) if isinstance(error, ValueError) else repr(error)).split())
                raise DataError(
                    f"{source.locate(self.data, published_split, number)}: not a {self.title} item ({problem}); "
                    "mend the record or fetch the file again. The fields are in tasks/ and docs/guides/add-a-task.md."
                ) from error
            if item is not None:
                items.append(item)
        if not items:
            raise DataError(f"{self.title} has no item in the split {published_split} of {self.data.file}.")
        return items


def _require_different(choices: tuple[str, ...]) -> None:
    stripped = [choice.strip() for choice in choices]
    for number, choice in enumerate(stripped):
        if choice in stripped[:number]:
            raise ValueError(f"choices {stripped.index(choice)} and {number} are equal: {choice[:60]!r}")


# Large enough for a standard error of about 2 points on a task, and a small share of the train splits.
MAX_VALIDATION_ITEMS = 500
# Fewer are needed for a likelihood, which varies less between items than accuracy. Its labels are long and slow.
MAX_DOMAIN_VALIDATION_ITEMS = 150


@dataclass(frozen=True)
class Domain:
    """Data sets that are trained on together.

    Validation scores the likelihood of their answers.

    Attributes:
        name: Name in commands and records.
        title: Name in tables.
        training_sets: The data sets whose train splits are used.
        tests: Names of the tasks that test what this domain teaches.
        metric: Name of the metric for the validation split.
    """

    name: str
    title: str
    training_sets: tuple[Task, ...]
    tests: tuple[str, ...]
    metric: str = LIKELIHOOD

    def load(self, source: Source) -> dict[str, list[Item]]:
        """Return the items of the train and validation splits.

        Raises:
            DataError: A file is missing or broken, or a record cannot be read.
        """
        items = [item for task in self.training_sets for item in task.read(source, "train")]
        train, validation = _split_off_validation(items, MAX_DOMAIN_VALIDATION_ITEMS)
        return {"train": train, "validation": validation}


def _split_off_validation(items: list[Item], max_items: int) -> tuple[list[Item], list[Item]]:
    """Split items at random into train and validation.

    The split does not depend on a run's seed, so learning rates are tuned on the same items for every seed.
    """
    validation, train = split_off(items, min(max_items, len(items) // 10), seed=0)
    return train, validation


def _merge_references(items: list[Item]) -> list[Item]:
    """Merge exercises with the same question into one that has all their references."""
    groups: dict[tuple[str, str, str], list[Exercise]] = {}
    for item in items:
        assert isinstance(item, Exercise), "a task with generation settings has exercises, not questions"
        groups.setdefault((item.context, item.text, item.lead), []).append(item)
    return [replace(group[0], references=tuple(r for e in group for r in e.references)) for group in groups.values()]
