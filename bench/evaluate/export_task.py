"""Export a task as a folder that `lm_eval --include_path` reads.

The folder has `NAME.yaml`, the examples as `NAME_SPLIT.jsonl`, and a module of functions. It needs nothing of this
repository, and may be moved.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from bench.errors import UserError
from bench.evaluate.metrics.last_number import last_number
from bench.evaluate.metrics.rouge_l import rouge_l
from bench.evaluate.score import METRICS
from bench.records.files import write_atomically
from tasks import Example, Source, Task, WrittenExample
from tasks.base import Writing
from tasks.build import build_task
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L

_GRADERS = {LAST_NUMBER: last_number, ROUGE_L: rouge_l}
_LOADING = '''"""Functions of the task {name}, written by `python -m bench export-task`."""

import functools
import importlib.util
import json
from pathlib import Path

import datasets

FOLDER = Path(__file__).resolve().parent


def load(**options):
    """Read the examples, which lie next to this file."""
    splits = {{}}
    for split in {splits}:
        with open(FOLDER / f"{name}_{{split}}.jsonl", encoding="utf-8") as lines:
            splits[split] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return splits
'''
_GRADING = '''

@functools.cache
def metric():
    """Return the module of the metric, which lies next to this file."""
    spec = importlib.util.spec_from_file_location("{module}", FOLDER / "{module}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grade(row, answers):
    """Grade one answer."""
    return {{"{metric}": metric().grade(answers[:1], [{references}])[0]}}
'''


class _Function(str):
    """The name of a function, which lm-eval finds next to the YAML file."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]  # yaml has no types
    """A writer of lm-eval's configurations, which name functions with a tag."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def export_task(task: Task, source: Source, format: str, folder: Path) -> Path:
    """Write the folder, and return the path of the YAML file.

    Prompts are those of this repository. Choices have the metric of their prompt format, computed by lm-eval. Written
    answers have the metric of the task, whose module is copied into the folder.

    Args:
        task: The task.
        source: Reader of the published records. A task that has its own files reads those.
        format: Name of the prompt format for questions with choices.
        folder: The folder to write, which may have other tasks.

    Raises:
        UserError: The task runs programs, its data cannot be read, or `folder` is a file.
    """
    if task.metric == PASS:
        raise UserError(f"{task.name} runs programs in the sandbox of this repository, which lm-eval does not have.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --output.")
    splits = build_task(task, source, format=format)
    folder.mkdir(parents=True, exist_ok=True)
    module = f"{task.name.replace('.', '_').replace('-', '_')}_functions"
    functions = _LOADING.format(name=task.name, splits=list(splits))
    if task.writing:
        grader = _GRADERS[task.writing.metric]
        name = Path(str(grader.__file__)).stem
        shutil.copyfile(str(grader.__file__), folder / f"{name}.py")
        references = 'row["references"][0]' if grader is last_number else 'row["references"]'
        functions += _GRADING.format(module=name, metric=task.writing.metric, references=references)
        config = _generation(task.writing, module)
    else:
        config = _choices(METRICS[format])
    for split, examples in splits.items():
        lines = "".join(json.dumps(_row(example), ensure_ascii=False) + "\n" for example in examples)
        write_atomically(folder / f"{task.name}_{split}.jsonl", lines)
    write_atomically(folder / f"{module}.py", functions)
    config = {"task": task.name, "custom_dataset": _Function(f"{module}.load"), "test_split": "test"} | config
    if "train" in splits:
        config |= {"training_split": "train", "validation_split": "validation", "fewshot_split": "train"}
    path = folder / f"{task.name}.yaml"
    write_atomically(path, yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    return path


def _row(example: Example) -> dict[str, Any]:
    """Return the fields of an example. lm-eval adds the space before a choice or an answer."""
    if isinstance(example, WrittenExample):
        return {"prompt": example.prompt, "answer": example.label[1:], "references": list(example.references)}
    return {"prompt": example.prompt, "choices": [c[1:] for c in example.choices], "answer": example.answer}


def _choices(metric: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _generation(writing: Writing, module: str) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "generation_kwargs": {
            "until": list(writing.stop),
            "max_gen_toks": writing.max_new_tokens,
            "do_sample": False,
        },
        "process_results": _Function(f"{module}.grade"),
        "metric_list": [{"metric": writing.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
