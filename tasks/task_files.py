"""Tasks and mixtures without code: data files, and descriptions in TOML or YAML.

A data file has one JSON object per line, in one of two forms:

- `question`, `choices` and `answer`: the answer is the text of the right choice, or its number from 0.
- `prompt` and `answer`, with a written answer; and `references`, a list of texts, if other answers are right as well.

Both may have a `context` to read first. Other fields are ignored. `TaskDescription` and `MixtureDescription` have the
settings that a description may have.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.base import DataRef, Exercise, Item, Question, Record, Task, Writing
from tasks.errors import DataError
from tasks.fields import index, one_of, optional_text, text, texts
from tasks.json_lines import read_json_lines
from tasks.metrics import LAST_NUMBER, ROUGE_L
from tasks.splits import SplitRule

DATA_SUFFIXES = (".jsonl", ".jsonl.gz")
DESCRIPTION_SUFFIXES = (".toml", ".yaml", ".yml")
SPLITS = ("train", "validation", "test")
FIELDS = ("question", "choices", "prompt", "answer", "references", "context")
MAX_NEW_TOKENS = 100_000  # more than models can read
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class _Description(BaseModel):
    """Settings from a file. An unknown setting, or one of another type, is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SplitDescription(_Description):
    """The settings of a `SplitRule`."""

    validation: float = SplitRule.validation
    test: float = SplitRule.test
    seed: int = SplitRule.seed


class TaskDescription(_Description):
    """The settings of a task.

    Attributes:
        name: Name in commands and records; by default that of the file.
        title: Name in tables; by default the name.
        data: A data file, or one for each of train, test and perhaps validation. Paths are relative to the description.
        fields: Names of fields in the data, by the names used here: `{"question": "stem"}`.
        split: Shares and seed of `SplitRule`, for data in one file.
        metric: "rougeL" (default) or "exact_match", which compares the last number. For written answers.
        max_new_tokens: Maximum length of a written answer.
        stop: Strings that end a written answer.
    """

    name: str | None = None
    title: str | None = None
    data: str | dict[Literal["train", "validation", "test"], str]
    fields: dict[Literal["question", "choices", "prompt", "answer", "references", "context"], str] = {}
    split: SplitDescription | None = None
    metric: Literal["rougeL", "exact_match"] = ROUGE_L  # type: ignore[assignment]  # a plain string there
    max_new_tokens: int = Field(default=64, gt=0, le=MAX_NEW_TOKENS)
    stop: list[str] = list(Writing("", 0).stop)


class MixtureDescription(_Description):
    """The settings of a mixture.

    Attributes:
        name: Name in commands and records; by default that of the file.
        tasks: Names of tasks, or paths of task files relative to the description.
        blend: "size" takes every training item, "even" the same number of each task.
        size: Maximum number of items per task in an even blend.
        note: A remark on the training data for tables.
    """

    name: str | None = None
    tasks: list[str] = Field(min_length=1)
    blend: Literal["size", "even"] = "size"
    size: int | None = Field(default=None, gt=0)
    note: str = ""


@dataclass(frozen=True)
class RecordFiles:
    """A source with one data file per split; data in one file have it for all splits."""

    paths: dict[str, Path]

    def read(self, ref: DataRef, split: str) -> list[Record]:
        """Return the records of a split's file."""
        return [record for _, record in read_json_lines(self.paths[split])]

    def locate(self, ref: DataRef, split: str, number: int) -> str:
        """Return the file and line of a record."""
        return f"{self.paths[split]}, line {read_json_lines(self.paths[split])[number][0]}"


def is_file_name(name: str) -> bool:
    """Return True for the name of a data file or of a description, rather than of a registered task."""
    return name.endswith((*DATA_SUFFIXES, *DESCRIPTION_SUFFIXES))


def read_task(path: Path) -> Task:
    """Make a task from a data file or from a description.

    Args:
        path: A file `*.jsonl` or `*.jsonl.gz` with data in one file, or a description `*.toml`, `*.yaml` or `*.yml`.

    Raises:
        DataError: The file, or a data file that it names, is missing or broken.
    """
    if path.name.endswith(DATA_SUFFIXES):
        description = TaskDescription(data=path.name)
    else:
        description = _read_description(path, TaskDescription)
    name = _name(description.name, path)
    if isinstance(description.data, str):
        files = dict.fromkeys(SPLITS, path.parent / description.data)
        rule = _split_rule(description, path)
    else:
        files, rule = {split: path.parent / file for split, file in description.data.items()}, None
        if missing := {"train", "test"} - files.keys():
            raise DataError(f"{path}: data has no {' and no '.join(sorted(missing))}; name a file for each.")
        if description.split:
            raise DataError(f"{path}: split is for data in one file, and data names several; remove one of them.")
    source = RecordFiles({split: files[split] for split in SPLITS if split in files})
    records = {split: source.read(DataRef(name, ""), split) for split in source.paths}
    names = {field: description.fields.get(field, field) for field in FIELDS}  # type: ignore[call-overload]
    is_written = names["question"] not in records["train"][0]
    _require_effect(description, is_written, path)
    writing = Writing(description.metric, description.max_new_tokens, tuple(description.stop))
    settings = description.model_dump(include={"fields", "metric", "max_new_tokens", "stop"}) | {"rule": repr(rule)}
    return Task(
        name,
        description.title or name,
        _make_parser(names, description.metric if is_written else None),
        DataRef(name, hub=""),
        {split: split for split in source.paths},
        writing if is_written else None,
        split_rule=rule,
        source=source,
        fingerprint=hashlib.sha256(json.dumps([settings, records], sort_keys=True).encode()).hexdigest(),
    )


def read_mixture(path: Path) -> tuple[str, MixtureDescription]:
    """Return the name and the settings of a mixture's description.

    Raises:
        DataError: The file is missing or broken.
    """
    description = _read_description(path, MixtureDescription)
    return _name(description.name, path), description


_D = TypeVar("_D", bound=_Description)


def _read_description(path: Path, kind: type[_D]) -> _D:
    if not path.name.endswith(DESCRIPTION_SUFFIXES):
        raise DataError(f"{path} is neither data ({', '.join(DATA_SUFFIXES)}) nor {', '.join(DESCRIPTION_SUFFIXES)}.")
    try:
        content = path.read_text(encoding="utf-8-sig")
        found = tomllib.loads(content) if path.suffix == ".toml" else yaml.safe_load(content)
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; settings are {', '.join(kind.model_fields)}.") from error
    except Exception as error:  # PyYAML passes on any exception that a wrong tag (`!!int ''`) or deep nesting causes
        raise DataError(f"{path} cannot be read: {' '.join((str(error) or repr(error)).split())}.") from error


def _name(name: str | None, path: Path) -> str:
    name = path.name.partition(".")[0] if name is None else name
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{path}: {name!r} cannot be a name, which has at most 100 letters, digits, '_', '-' and '.'; "
            "rename the file, or set name in a description."
        )
    return name


def _split_rule(description: TaskDescription, path: Path) -> SplitRule:
    try:
        return SplitRule(**(description.split or SplitDescription()).model_dump())
    except ValueError as error:
        raise DataError(f"{path}: split: {error}.") from error


def _require_effect(description: TaskDescription, is_written: bool, path: Path) -> None:
    """Refuse settings that would be ignored."""
    of_writing = {"metric", "max_new_tokens", "stop"} & description.model_fields_set
    if of_writing and not is_written:
        raise DataError(
            f"{path}: {', '.join(sorted(of_writing))} has no effect on questions with choices; remove it, or name the "
            "field with the question prompt, for written answers."
        )
    ignored = description.fields.keys() & ({"question", "choices"} if is_written else {"prompt", "references"})
    if ignored:
        raise DataError(f"{path}: fields.{min(ignored)}: its data are not read by this kind of task; see the guide.")


def _make_parser(names: dict[str, str], metric: str | None) -> Callable[[Record], Item]:
    """Return the function that parses a record.

    Args:
        names: The data's names of FIELDS.
        metric: The metric of written answers, or None for questions with choices.
    """

    def parse_question(record: Record) -> Question:
        choices = texts(record, names["choices"])
        if isinstance(record.get(names["answer"]), str):
            answer = one_of(record, names["answer"], choices)
        else:
            answer = index(record, names["answer"])
        question = text(record, names["question"]).strip()
        return Question(question, choices, answer, optional_text(record, names["context"]).strip())

    def parse_prompt(record: Record) -> Exercise:
        if extra := {names["question"], names["choices"]} & record.keys():
            raise ValueError(f"field {min(extra)!r} is of questions with choices, and the first record has a prompt")
        answer = text(record, names["answer"]).strip()
        references = texts(record, names["references"]) if names["references"] in record else (answer,)
        if metric == LAST_NUMBER and not all(any(map(str.isdigit, reference)) for reference in references):
            raise ValueError(f"the metric {LAST_NUMBER} needs a number in the answer: {answer[:60]!r}")
        context = optional_text(record, names["context"]).strip()
        return Exercise(text(record, names["prompt"]).strip(), answer, references, context)

    return parse_prompt if metric else parse_question
