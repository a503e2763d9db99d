"""lm-eval task configurations made from our examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from bench.evaluate.grade import grader
from tasks import Example, WrittenExample
from tasks.base import Writing
from tasks.metrics import LIKELIHOOD


def choice_config(name: str, examples: list[Example], metric: str) -> dict[str, Any]:
    """An lm-eval multiple-choice task over these examples."""
    rows = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in examples]
    return _config(name, rows, metric) | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }


def likelihood_config(name: str, examples: list[Example], language_model: HFLM) -> dict[str, Any]:
    """The geometric mean probability of a label's tokens, each after those before it."""
    rows = [
        {"prompt": e.prompt, "label": e.label, "tokens": len(language_model._encode_pair(e.prompt, e.label)[1])}
        for e in examples
    ]
    return _config(name, rows, LIKELIHOOD) | {
        "output_type": "loglikelihood",
        "doc_to_target": lambda row: row["label"],
        "process_results": lambda row, results: {LIKELIHOOD: math.exp(results[0][0] / row["tokens"])},
    }


def written_config(name: str, examples: list[WrittenExample], writing: Writing, unsafe_code: bool) -> dict[str, Any]:
    """Answers that are written. They are graded in a filter, which lm-eval hands all answers of a task at once."""
    rows = [{"prompt": e.prompt, "references": list(e.references)} for e in examples]
    grade = grader(writing.metric, unsafe_code)

    def graded(answers: list[list[str]], documents: Iterable[dict]) -> list[float]:
        return grade([answer for (answer,) in answers], [row["references"] for row in documents])

    return _config(name, rows, writing.metric) | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": list(writing.stop), "max_gen_toks": writing.max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": graded}]}],
        "process_results": lambda row, results: {writing.metric: results[0]},
    }


def _config(name: str, rows: list[dict], metric: str) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": lambda row: row["prompt"],  # as a template it would be compiled anew for every item
        "target_delimiter": "",  # our labels begin with their blank
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval: its log speaks to its own command line, and its progress bars would tear ours."""

    def silent(*args: Any, **options: Any) -> tqdm:
        return tqdm(*args, **{**options, "disable": True})

    with ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", silent))
        previous = logging.root.manager.disable
        logging.disable(logging.ERROR)
        stack.callback(logging.disable, previous)
        yield
