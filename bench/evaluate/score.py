"""Score a model with lm-eval.

The model in memory is wrapped for lm-eval, and each task is a configuration made from our own examples, the same that
training reads. Nothing is downloaded, and nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from bench.evaluate.answer_journal import Recall, compute_always
from bench.evaluate.lm_eval_model import LabelPositionLM
from bench.evaluate.lm_eval_tasks import choice_config, generation_config, likelihood_config, quiet_lm_eval
from bench.records.schema import GoldAnswers
from bench.records.scorer_versions import scorer_version
from bench.runtime.progress import Progress
from bench.sandbox.execute import require_sandbox
from tasks import TASKS, Example, WrittenExample
from tasks.metrics import LIKELIHOOD, PASS

# Metric of choices, by prompt format. A letter is one token, so likelihoods compare directly. Answers of different
# lengths are compared by likelihood per character, which lm-eval reports for ARC, OpenBookQA and PIQA.
METRICS = {"letters": "acc", "cloze": "acc_norm"}
SUMMED = "acc"  # metric of mixtures that compare the likelihood of a choice's whole text, in either format
DIGITS = 5  # of an item's loss, to keep records small

Scores = dict[str, dict[str, Any]]
Outcomes = dict[str, list[float]]
Gold = dict[str, GoldAnswers]


def metric_of(task: str, format: str, summed: bool = False) -> str:
    """Return the name of a task's metric.

    Args:
        task: Name of a task or a domain.
        format: Prompt format, from which the metric of choices follows.
        summed: Compare choices by the likelihood of their whole text, whatever the format.
    """
    return TASKS[task].metric or (SUMMED if summed else METRICS[format])


def require_scoring(tasks: Iterable[str], unsafe_code: bool = False) -> None:
    """Check that these tasks can be scored on this machine.

    The check comes before a run spends time on training.

    Raises:
        UserError: A task runs generated programs, and bubblewrap cannot make a sandbox for them.
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
    summed: bool = False,
    progress_of: str | None = None,
    recall: Recall = compute_always,
) -> tuple[Scores, Outcomes, Gold]:
    """Score the model on all tasks. On a GPU it runs in bfloat16, as in training.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        examples: Items by the name of their task in TASKS, which decides how they are scored.
        format: Prompt format, which decides the metric of choices.
        batch_size: Items per forward pass.
        generation_batch_size: Answers generated at a time.
        unsafe_code: Run generated programs without a sandbox.
        summed: Compare choices by the likelihood of their whole text, whatever the format.
        progress_of: Name of the run to show progress of, in answers: choices that are compared, texts that are
            generated, and known answers whose likelihood is computed. None shows nothing.
        recall: Returns the model's answers to a batch; `AnswerJournal.recall` keeps them for a run that is killed.

    Returns:
        Scores by task: the fields of `TaskScore`.
        Outcomes of the items by task: 1 if right and 0 if wrong; ROUGE-L and likelihoods lie between.
        Losses of the correct answers, and their classes, by task.
    """
    metrics = {name: metric_of(name, format, summed) for name in examples}
    on_gpu = next(model.parameters()).device.type == "cuda"
    was_training = model.training
    model.eval()
    with quiet_lm_eval():
        language_model = LabelPositionLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if on_gpu else None,
        )
        language_model.generation_batch_size = generation_batch_size
        language_model.recall = recall

        def config(name: str, items: list[Example]) -> dict[str, Any]:
            if metrics[name] == LIKELIHOOD:
                return likelihood_config(name, items, language_model.count_label_tokens)
            if writing := getattr(TASKS[name], "writing", None):
                return generation_config(name, cast(list[WrittenExample], items), writing, unsafe_code)
            return choice_config(name, items, metrics[name])

        with torch.no_grad(), _show_progress(language_model, examples, metrics, progress_of):
            results = simple_evaluate(
                model=language_model,
                tasks=[config(name, items) for name, items in examples.items()],
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=0,
                bootstrap_iters=1,  # with 0 lm-eval leaves out the standard error; that of a mean needs no bootstrap
                log_samples=True,
                verbosity="ERROR",
            )
            gold = {name: _gold(name, items, results, language_model) for name, items in examples.items()}
    model.train(was_training)
    scores, outcomes = _read_results(results, metrics)
    for name, found in gold.items():
        scores[name] |= found.summary(outcomes[name])
        if metrics[name] in METRICS.values():
            scores[name]["guess"] = sum(1 / len(item.choices) for item in examples[name]) / len(examples[name])
    return scores, outcomes, gold


def _gold(name: str, items: list[Example], results: dict[str, Any], language_model: LabelPositionLM) -> GoldAnswers:
    """Return the losses of the items' correct answers, and their classes if the task has any.

    lm-eval has computed the likelihood of every choice. Of generated answers it has none.
    """
    if getattr(TASKS[name], "writing", None):
        texts = [(item.prompt, item.label) for item in items]
        likelihoods = language_model.answer_loglikelihoods(texts)
    else:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        responses = [sample["filtered_resps"] for sample in samples]
        # Of a label whose likelihood is the metric there is one response, of choices one each.
        likelihoods = [r[item.answer if len(r) > 1 else 0][0] for r, item in zip(responses, items, strict=True)]
    classes = sorted({item.label for item in items})
    return GoldAnswers(
        nats=[float(f"{abs(value):.{DIGITS}g}") for value in likelihoods],
        label_tokens=[language_model.count_label_tokens(item.prompt, item.label) for item in items],
        classes=[classes.index(item.label) for item in items] if getattr(TASKS[name], "has_classes", False) else None,
    )


@contextmanager
def _show_progress(
    language_model: LabelPositionLM, examples: dict[str, list[Example]], metrics: dict[str, str], name: str | None
) -> Iterator[None]:
    """Show the progress of a run by this name; without one, show nothing."""
    if name is None:
        yield
        return
    total = sum(
        1 if metrics[task] == LIKELIHOOD else 2 if getattr(TASKS[task], "writing", None) else len(item.choices)
        for task, items in examples.items()
        for item in items
    )
    done = new = 0
    with Progress(name, "answer", total) as progress:

        def show(count: int, is_new: bool) -> None:
            nonlocal done, new
            done += count
            new += count if is_new else 0
            progress.update(done, lambda seconds: f"{new / seconds:,.1f} answers/s")

        language_model.answered_more = show
        yield


def _read_results(results: dict[str, Any], metrics: dict[str, str]) -> tuple[Scores, Outcomes]:
    """Take scores and outcomes out of lm-eval's results."""
    scores: Scores = {}
    outcomes: Outcomes = {}
    for name, metric in metrics.items():
        row = results["results"][name]
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        outcomes[name] = [_outcome(sample[metric]) for sample in samples]
        scores[name] = {
            "metric": metric,
            "value": float(row[f"{metric},none"]),
            "stderr": _number(row[f"{metric}_stderr,none"]),
            "n": len(samples),
            "version": scorer_version(name, metric),
        }
    return scores, outcomes


def _outcome(value: Any) -> float:
    """Return a plain int if the value is one, else a float; lm-eval's may be numpy's."""
    return int(value) if value == int(value) else float(value)


def _number(value: Any) -> float | None:
    """Return None for "N/A", lm-eval's standard error of a single item."""
    return float(value) if isinstance(value, float) else None
