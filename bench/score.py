"""Scores by lm-eval: the live model goes to its HFLM, and each task is a configuration made from our examples.

Nothing here touches the network or the disk: lm-eval gets the examples themselves, the same that training read.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
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
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bench.generate import generate
from bench.grade import grader
from bench.sandbox import require_sandbox
from bench.step import label_positions_only
from tasks import TASKS, Example, WrittenExample
from tasks.base import LIKELIHOOD, PASS, Writing

# Of prompts, metrics and precision; counts up when a score could change. 2: on a GPU the head's product is in float32,
# so that the logits of two choices do not tie in bfloat16; of 9,156 items of the small profile's base, one changed.
VERSION = 2

# Of choices, by prompt format. A letter is one token, so likelihoods compare as they are; answers of different lengths
# are compared by likelihood a character, which is what lm-eval reports for ARC, OpenBookQA and PIQA.
METRICS = {"letters": "acc", "cloze": "acc_norm"}
# Label positions whose logits are there at once: for a vocabulary of 49,152, and with their logarithms, 6 GiB.
MOST_LABELS = 16_384


def require_scoring(tasks: Iterable[str], unsafe_code: bool = False) -> None:
    """Make sure, before any work is spent, that these tasks can be scored.

    Raises:
        UserError: one of them runs what models write, and bubblewrap is not there to make a sandbox for it.
    """
    if any(TASKS[name].metric == PASS for name in tasks):
        require_sandbox(unsafe_code)


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, list[Example]],
    *,
    format: str,
    batch_size: int,
    generation_batch_size: int = 64,
    unsafe_code: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Scores by task (metric, value, stderr, n, version), and each item's: 1 if it was answered right, else 0.

    ROUGE-L and likelihoods are between. On a GPU the products are in bfloat16, as in training.

    Args:
        examples: by the name of their task in TASKS, which says how they are scored.
        format: of the choices.
        generation_batch_size: answers that are written at a time.
        unsafe_code: run what the model writes without a sandbox.
    """
    metrics = {name: TASKS[name].metric or METRICS[format] for name in examples}
    mixed_precision = "bfloat16" if model.device.type == "cuda" else None
    was_training = model.training
    model.eval()
    with _quiet():
        language_model = _LanguageModel(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed_precision
        )
        language_model.generation_batch_size = generation_batch_size

        def config(name: str, items: list[Example]) -> dict[str, Any]:
            if metrics[name] == LIKELIHOOD:
                return likelihood_config(name, items, language_model)
            if writing := getattr(TASKS[name], "writing", None):
                return written_config(name, items, writing, unsafe_code)
            return choice_config(name, items, metrics[name])

        with torch.no_grad():
            results = simple_evaluate(
                model=language_model,
                tasks=[config(name, items) for name, items in examples.items()],
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
        metric = metrics[name]
        outcomes[name] = [_outcome(sample[metric]) for sample in samples]
        scores[name] = {
            "metric": metric,
            "value": float(row[f"{metric},none"]),
            "stderr": _number(row[f"{metric}_stderr,none"]),
            "n": len(samples),
            "version": VERSION,
        }
    return scores, outcomes


class _LanguageModel(HFLM):
    """HFLM, but for how it asks for likelihoods and texts: the same for a fraction of the time and memory.

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
            asked[tuple(whole[:-1])].append((number, continuation[-self.max_length :]))
        inputs = sorted(asked, key=len)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for chunk in self._chunks(inputs, lambda ids: sum(len(continuation) for _, continuation in asked[ids])):
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

    def _chunks(self, inputs: list[tuple], labels: Callable[[tuple], int]) -> Iterator[list[tuple]]:
        """Runs of the inputs, of at most a batch and MOST_LABELS labels."""
        chunk, total = [], 0
        for ids in inputs:
            if chunk and (len(chunk) == self.batch_size or total + labels(ids) > MOST_LABELS):
                yield chunk
                chunk, total = [], 0
            chunk.append(ids)
            total += labels(ids)
        if chunk:
            yield chunk

    def generate_until(self, requests: list[Instance], *args: Any, **options: Any) -> list[str]:
        """What is written after each request's context, up to the first of its stop strings."""
        answers = [""] * len(requests)
        alike = defaultdict(list)  # stop strings and most tokens -> numbers of the requests
        for number, request in enumerate(requests):
            how = request.args[1]
            alike[tuple(how["until"]), how["max_gen_toks"]].append(number)
        for (stop, most), numbers in alike.items():
            prompts = [self.tok_encode(requests[n].args[0])[-(self.max_length - most) :] for n in numbers]
            written = generate(
                self.model,
                prompts,
                most=most,
                batch_size=self.generation_batch_size,
                end=[self.eot_token_id],
                stopped=lambda tokens, stop=stop: _until(stop, text := self.tok_decode(tokens)) != text,
            )
            for n, tokens in zip(numbers, written, strict=True):
                answers[n] = _until(stop, self.tok_decode(tokens))
        return answers


def _until(stop: tuple[str, ...], text: str) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


@cache
def _tokenized_by(tokenizer: str) -> dict[tuple, list[int]]:
    """What a tokenizer, given as its own JSON, has made of texts in this process."""
    return {}


def _outcome(value: Any) -> float:
    """As plain a number as it is; lm-eval's may be numpy's."""
    return int(value) if value == int(value) else float(value)


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" for the standard error of a single item."""
    return float(value) if isinstance(value, float) else None


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
