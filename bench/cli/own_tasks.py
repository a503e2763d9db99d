"""Tasks of files on the command line: `--task`, `--mixture FILE` and `export-task`."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from bench.command_line import file_name, file_path, one_of
from bench.errors import UserError, unknown_name
from bench.evaluate.export_task import export_task
from bench.experiments.profiles import Profile
from tasks import FORMATS, MIXTURES, TASKS, Folder, Generator, Hub, Source, Task
from tasks.base import Question
from tasks.procedural import GENERATORS, VOCABULARY
from tasks.procedural_inter import WRITERS
from tasks.registry import add_mixture, add_task, add_to_mixture
from tasks.task_files import DESCRIPTION_SUFFIXES, is_file_name

DEFAULT_MIXTURE = "intra"


def add_mixture_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the options `--mixture` and `--task`.

    Args:
        parser: Parser of a command that trains or scores.
        text: Help of `--mixture`.
    """
    parser.add_argument(
        "--mixture",
        type=_mixture,
        metavar="NAME",
        help=f"{text}; or a description, *.toml or *.yaml (default: {DEFAULT_MIXTURE}, or the tasks of --task alone)",
    )
    parser.add_argument(
        "--task",
        type=file_path,
        action="append",
        default=[],
        metavar="FILE",
        help="task of your own, added to the mixture: *.jsonl with question, choices and answer, or with prompt and "
        "answer; or its description, *.toml or *.yaml; may be repeated",
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export-task`."""
    parser.add_argument("task", type=file_name, metavar="TASK", help="name of a task, or the file of one of your own")
    parser.add_argument(
        "--output",
        type=file_path,
        default=Path("lm_eval_tasks"),
        metavar="DIR",
        help="folder for lm_eval --include_path",
    )
    parser.add_argument(
        "--format", type=one_of("format", FORMATS), default="letters", metavar="F", help="prompt format of choices"
    )
    parser.add_argument(
        "--data", type=file_path, metavar="DIR", help="folder of *.jsonl.gz files (default: the Hugging Face hub)"
    )
    parser.set_defaults(command=export)


def _mixture(value: str) -> str:
    return file_name(value) if value.endswith(DESCRIPTION_SUFFIXES) else one_of("mixture", MIXTURES)(value)


def resolve(options: argparse.Namespace, mixture: str | None, profile: Profile) -> str:
    """Read the files that the options name, and return the name of the mixture to train or score on.

    Raises:
        UserError: A file is missing or broken, or has words that the tiny base model does not know.
    """
    added = tuple(add_task(path) for path in getattr(options, "task", ()))
    if mixture and mixture.endswith(DESCRIPTION_SUFFIXES):
        mixture = add_mixture(Path(mixture))
    elif mixture and added and not options.data:
        mixture = profile.mixtures.get(mixture, mixture)  # the profile has no substitute for the name with a "+"
    if profile.name == "tiny" and not options.model:
        _require_known_words()
    if mixture is None and added:
        mixture, *rest = added
        added = tuple(rest)
    mixture = mixture or DEFAULT_MIXTURE
    return add_to_mixture(mixture, added) if added else mixture


def _require_known_words() -> None:
    """Check that the tiny base model, which has a token per word and few words, can read the tasks of files."""
    for task in TASKS.values():
        if not isinstance(task, Task) or task.source is None:
            continue
        for item in itertools.chain(*task.load(task.source).values()):
            texts = (item.context, item.text, *(item.choices if isinstance(item, Question) else (item.answer,)))
            if unknown := set(" ".join(texts).split()) - set(VOCABULARY):
                raise UserError(
                    f"the tiny base model knows {len(VOCABULARY)} words, and {min(unknown)!r} of {task.title} is none "
                    "of them; use --profile small, or give another --model."
                )


def export(options: argparse.Namespace) -> int:
    """Write a task as a folder for lm-eval."""
    name = add_task(Path(options.task)) if is_file_name(options.task) else options.task
    task = TASKS.get(name)
    if not isinstance(task, Task):
        known = [name for name, task in TASKS.items() if isinstance(task, Task)]
        raise UserError(f"{unknown_name('task', name, known)}, and files by their path.")
    source: Source
    if options.data:
        source = Folder(options.data)
    else:
        source = Generator() if name in {**GENERATORS, **WRITERS} else Hub()
    path = export_task(task, source, options.format, options.output)
    print(f"written to {path}; run it with: lm_eval --include_path {options.output} --tasks {name} --model hf ...")
    return 0
