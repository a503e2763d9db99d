"""Scores by lm-eval: the live model goes to its HFLM, and each task is a configuration made from our examples.

Nothing here touches the network or the disk: lm-eval gets the examples themselves, the same that training read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
import torch.nn.functional as F
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bench.step import label_positions_only
from tasks import Example

# Of prompts, metrics and precision; counts up when a score could change. 2: on a GPU the head's product is in float32,
# so that the logits of two choices do not tie in bfloat16; of 9,156 items of the small profile's base, one changed.
VERSION = 2

# By prompt format. A letter is one token, so likelihoods compare as they are; answers of different lengths are compared
# by likelihood a character, which is what lm-eval reports for ARC, OpenBookQA and PIQA.
METRICS = {"letters": "acc", "cloze": "acc_norm"}


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, list[Example]],
    *,
    format: str,
    batch_size: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """Scores by task (metric, value, stderr, n, version), and for each item 1 if it was answered right, else 0.

    On a GPU the products are in bfloat16, as in training.
    """
    metric = METRICS[format]
    mixed_precision = "bfloat16" if model.device.type == "cuda" else None
    was_training = model.training
    model.eval()
    with _quiet():
        language_model = _LanguageModel(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed_precision
        )
        with torch.no_grad():
            results = simple_evaluate(
                model=language_model,
                tasks=[task_config(name, items, metric) for name, items in examples.items()],
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=0,
                bootstrap_iters=1,  # lm-eval omits the standard error at 0; that of a mean needs no bootstrap
                log_samples=True,
                verbosity="ERROR",
            )
    model.train(was_training)
    scores, outcomes = {}, {}
    for name in examples:
        row = results["results"][name]
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        outcomes[name] = [int(sample[metric]) for sample in samples]
        scores[name] = {
            "metric": metric,
            "value": float(row[f"{metric},none"]),
            "stderr": _number(row[f"{metric}_stderr,none"]),
            "n": len(samples),
            "version": VERSION,
        }
    return scores, outcomes


class _LanguageModel(HFLM):
    """HFLM, but for how it asks for likelihoods: the same figures for a fraction of the time and memory.

    HFLM takes the logarithm of the logits of every position in the model's precision, and waits for the device several
    times for each choice. Here the head runs where a choice's tokens are to be predicted, in float32, so that logits
    that differ do not tie, and each batch is waited for once. Texts are tokenized once in the life of the process.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.known = _tokenized_by(self.tokenizer.backend_tokenizer.to_str())

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        key = (string, args, tuple(options.items()))
        if key not in self.known:
            self.known[key] = super().tok_encode(string, *args, **options)
        return self.known[key]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the continuation's log-likelihood, and if it is the likeliest."""
        asked = defaultdict(list)  # input -> (number of the request, continuation); choices of one token share theirs
        for number, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            asked[tuple(whole[:-1])].append((number, continuation))
        inputs = sorted(asked, key=len)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for start in range(0, len(inputs), self.batch_size):
            chunk = inputs[start : start + self.batch_size]
            width = len(chunk[-1])
            places = [
                (number, row, len(ids) - len(continuation) + place, token)
                for row, ids in enumerate(chunk)
                for number, continuation in asked[ids]
                for place, token in enumerate(continuation)
            ]
            number, row, column, target = torch.tensor(places).T.contiguous().to(self.device)
            ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in chunk], device=self.device)
            with label_positions_only(self.model, row, column, in_float32=True):
                logits = self._model_call(ids)
            likelihood = -F.cross_entropy(logits, target, reduction="none")
            likeliest = logits.argmax(-1) == target
            for n, value, is_likeliest in zip(*(x.tolist() for x in (number, likelihood, likeliest)), strict=True):
                answers[n] = (answers[n][0] + value, answers[n][1] and is_likeliest)
        return answers


@cache
def _tokenized_by(tokenizer: str) -> dict[tuple, list[int]]:
    """What a tokenizer, given as its own JSON, has made of texts in this process."""
    return {}


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" for the standard error of a single item."""
    return float(value) if isinstance(value, float) else None


def task_config(name: str, examples: list[Example], metric: str) -> dict[str, Any]:
    """An lm-eval multiple-choice task over these examples."""
    rows = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in examples]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["prompt"],  # as a template it would be compiled anew for every item
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # our choices begin with their blank
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


@contextmanager
def _quiet() -> Iterator[None]:
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
