"""Scores by lm-eval: the live model goes to its HFLM, and each task is a configuration made from our examples.

Nothing here touches the network or the disk: lm-eval gets the examples themselves, the same that training read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from bench.evaluate.lm_eval_model import _LanguageModel
from bench.evaluate.lm_eval_tasks import choice_config, likelihood_config, quiet_lm_eval, written_config
from bench.sandbox.execute import require_sandbox
from tasks import TASKS, Example
from tasks.metrics import LIKELIHOOD, PASS

# Of prompts, metrics and precision; counts up when a score could change. 2: on a GPU the head's product is in float32,
# so that the logits of two choices do not tie in bfloat16; of 9,156 items of the small profile's base, one changed.
VERSION = 2
# Of choices, by prompt format. A letter is one token, so likelihoods compare as they are; answers of different lengths
# are compared by likelihood a character, which is what lm-eval reports for ARC, OpenBookQA and PIQA.
METRICS = {"letters": "acc", "cloze": "acc_norm"}


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
    with quiet_lm_eval():
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


def _outcome(value: Any) -> float:
    """As plain a number as it is; lm-eval's may be numpy's."""
    return int(value) if value == int(value) else float(value)


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" for the standard error of a single item."""
    return float(value) if isinstance(value, float) else None
