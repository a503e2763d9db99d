"""Analysis of a routed adapter at the end of its training.

The analysis is the section `inside` of the adapter's record. Records do not keep weights. This section keeps means over
modules, by decoder layer where layers differ. Routing is measured on some validation prompts of each task. Everything
else is computed from the factors.

Shapes: N experts, "layers" decoder layers. An expert has two projections: "A", its down projection, and "B", its up
projection.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

import malora
from bench.runtime.logits import label_positions_only
from bench.runtime.tokens import encode_texts
from malora.analysis import Experts, extract_experts, load_experts, means, movement, similarities, spectra

PROMPTS_PER_TASK = 32  # one forward pass of some thousand tokens
MAX_TOKENS = 512  # tokens per prompt


def analyze_adapter(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    start: Experts,
    prompts: dict[str, list[str]],
    peers: dict[str, Path],
) -> dict[str, Any]:
    """Compute the statistics of the paper's Figures 2 and 3, and some more.

    Args:
        model: A trained PEFT model with a router.
        tokenizer: Its tokenizer.
        start: Its experts before training.
        prompts: Prompts by task, of items that are not scored.
        peers: Folders of other adapters, by the name of the comparison. A folder that does not exist is left out.

    Returns:
        A dictionary with four entries.

        similarity: By comparison ("within" the model, "start", the peers), statistic and projection: [value, value
            expected by chance].
        spectra: By projection: `values`, the singular values of the stacked experts in descending order, as means over
            modules; `stable_rank` and `effective_rank`.
        movement: `factor`, which is S or, if the adapter has none, A; `relative`, the relative change of the factor,
            [layers]; `angle`, the mean principal angle between its row spaces before and after, in degrees.
        routing: By decoder layer; see `_routing`.
    """
    now = extract_experts(model)
    others = {name: load_experts(folder) for name, folder in peers.items() if folder.is_dir()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are many and small: with several threads this takes seven times as long
    similarity = {"within": _similarity(now), "start": _similarity(start)}
    similarity |= {name: _similarity(now, other) for name, other in others.items()}
    found = {"similarity": similarity, "spectra": _spectra(now), "movement": _movement(now, start)}
    torch.set_num_threads(threads)
    return found | {"routing": _routing(model, tokenizer, prompts)}


def _similarity(one: Experts, other: Experts | None = None) -> dict[str, dict[str, Any]]:
    records = similarities(one, other)
    return {statistic: means(records, statistic) for statistic in ("mean", "mean_square")}


def _spectra(now: Experts) -> dict[str, dict[str, Any]]:
    by_projection = defaultdict(list)
    for spectrum in spectra(now):
        by_projection[spectrum.projection].append(spectrum)
    return {
        projection: {
            "values": [float(np.mean(v)) for v in _columns([s.values for s in found])],
            "stable_rank": _mean(s.stable_rank for s in found),
            "effective_rank": _mean(s.effective_rank for s in found),
        }
        for projection, found in by_projection.items()
    }


def _columns(lists: list[list[float]]) -> list[list[float]]:
    """Return the first values of all lists, then the second values, and so on.

    The lists may differ in length.
    """
    return [[v for v in column if v is not None] for column in itertools.zip_longest(*lists)]


def _movement(now: Experts, start: Experts) -> dict[str, Any]:
    factor = "A" if next(iter(start.values())).S is None else "S"
    moved = movement(now, start, factor=factor)
    by_layer = defaultdict(list)
    for one in moved:
        by_layer[_layer(one.module)].append(one.relative)
    angle = np.degrees(np.mean([np.mean(one.angles) for one in moved]))
    return {"factor": factor, "relative": [_mean(by_layer[i]) for i in sorted(by_layer)], "angle": float(angle)}


def _routing(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[str]]) -> dict[str, Any]:
    """Average router statistics over the routers of each decoder layer.

    Expert t of one router has no relation to expert t of another, so loads are sorted before they are averaged.

    Returns:
        entropy: By task, mean entropy in nats, [layers].
        largest_share: By task, the largest expert's share of the assignments, [layers].
        unused: By task, the number of experts without a token, [layers].
        load: Shares of the assignments in descending order, with equal weight for every task, [layers, N].
        task_information: Mutual information of task and expert in nats, with equal weight for every task, [layers]. It
            is 0 if routing does not depend on the task.
    """
    was_training = model.training
    model.eval()
    stats = {task: _router_stats(model, tokenizer, texts) for task, texts in prompts.items()}
    model.train(was_training)
    by_layer = defaultdict(list)
    for module in next(iter(stats.values())):
        by_layer[_layer(module)].append(module)
    layers = [by_layer[i] for i in sorted(by_layer)]
    shares = {m: np.array([by_module[m].share for by_module in stats.values()]) for layer in layers for m in layer}

    def by_task(value: Callable[[malora.RouterStats], float]) -> dict[str, list[float | None]]:
        return {task: [_mean(value(s[m]) for m in layer) for layer in layers] for task, s in stats.items()}

    return {
        "entropy": by_task(lambda s: s.entropy),
        "largest_share": by_task(lambda s: max(s.share)),
        "unused": by_task(lambda s: len(s.unused)),
        "load": [np.mean([np.sort(shares[m].mean(0))[::-1] for m in layer], 0).tolist() for layer in layers],
        "task_information": [_mean(_task_information(shares[m]) for m in layer) for layer in layers],
    }


@torch.no_grad()
def _router_stats(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, malora.RouterStats]:
    """Run the model on the first prompts and return its router statistics by module."""
    device = next(model.parameters()).device
    rows = [torch.tensor(ids[:MAX_TOKENS]) for ids in encode_texts(tokenizer, texts[:PROMPTS_PER_TASK])]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    ids = pad_sequence(rows, batch_first=True).to(device)
    one_position = torch.zeros(1, dtype=torch.long, device=device)  # no logits are read, and all would be gigabytes
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with precision, label_positions_only(model, one_position, one_position):
        model(input_ids=ids, attention_mask=mask)
    return malora.router_stats(model)


def _task_information(shares: np.ndarray) -> float:
    """Compute the mutual information of task and expert in nats.

    It is computed from shares of the assignments [tasks, N].
    """
    return _entropy(shares.mean(0)) - float(np.mean([*map(_entropy, shares)]))


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _mean(values: Iterable[float | None]) -> float | None:
    """Average the values that are not None, or return None if there are none.

    A zero matrix, for example, has no stable rank.
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _layer(module: str) -> int:
    """Return the decoder layer's number: the first number in a module's name."""
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)
