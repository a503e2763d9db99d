"""Make task configurations for lm-eval from our examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
from tqdm import tqdm

from bench.evaluate.grade import grader
from tasks import Example, WrittenExample
from tasks.base import Writing
from tasks.metrics import LIKELIHOOD


def choice_config(name: str, examples: Sequence[Example], metric: str) -> dict[str, Any]:
    """Configure a multiple-choice task.

    lm-eval counts the characters of a choice without the delimiter in front of it, so the blank that our choices begin
    with is given as the delimiter.

    Args:
        name: Name of the task.
        examples: Its items.
        metric: `acc` or `acc_norm`.
    """
    delimiter = " " if all(choice.startswith(" ") for e in examples for choice in e.choices) else ""
    rows = [
        {"prompt": e.prompt, "choices": [choice.removeprefix(delimiter) for choice in e.choices], "answer": e.answer}
        for e in examples
    ]
    return _config(name, rows, metric) | {
        "output_type": "multiple_choice",
        "target_delimiter": delimiter,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }


def likelihood_config(
    name: str, examples: Sequence[Example], count_tokens: Callable[[str, str], int]
) -> dict[str, Any]:
    """Configure a task that is scored by the probabilities of a label's tokens.

    Its metric is their geometric mean.

    Args:
        name: Name of the task.
        examples: Its items.
        count_tokens: Returns the number of a label's tokens, for a prompt and its label.
    """
    rows = [{"prompt": e.prompt, "label": e.label, "tokens": count_tokens(e.prompt, e.label)} for e in examples]
    return _config(name, rows, LIKELIHOOD) | {
        "output_type": "loglikelihood",
        "doc_to_target": lambda row: row["label"],
        "process_results": lambda row, results: {LIKELIHOOD: math.exp(results[0][0] / row["tokens"])},
    }


def generation_config(
    name: str, examples: Sequence[WrittenExample], writing: Writing, unsafe_code: bool
) -> dict[str, Any]:
    """Configure a task whose answers are generated.

    Answers are graded in a filter, because lm-eval passes it all answers of a task at once.

    Args:
        name: Name of the task.
        examples: Its items.
        writing: The metric, the stop strings and the maximum tokens of an answer.
        unsafe_code: Run generated programs without a sandbox.
    """
    rows = [{"prompt": e.prompt, "references": list(e.references)} for e in examples]
    grade = grader(writing.metric, unsafe_code)

    def grade_answers(answers: list[list[str]], documents: Iterable[dict[str, Any]]) -> Sequence[float]:
        return grade([answer for (answer,) in answers], [row["references"] for row in documents])

    return _config(name, rows, writing.metric) | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": list(writing.stop), "max_gen_toks": writing.max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": grade_answers}]}],
        "process_results": lambda row, results: {writing.metric: results[0]},
    }


def _config(name: str, rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": lambda row: row["prompt"],  # a template would be compiled again for every item
        "target_delimiter": "",  # our labels begin with their space
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, and keep it from collecting facts about the machine.

    Its log is meant for its own command line, and its progress bars would overwrite ours. The facts, which a record has
    from elsewhere, take it a second per call: it starts git and `pip list`.
    """

    def silent(*args: Any, **options: Any) -> tqdm:
        return tqdm(*args, **{**options, "disable": True})

    with ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", silent))
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(patch.object(lm_eval.evaluator, name, lambda *_: None))
        previous = logging.root.manager.disable
        logging.disable(logging.ERROR)
        stack.callback(logging.disable, previous)
        yield
