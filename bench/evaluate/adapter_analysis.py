"""What a routed adapter is like inside at the end of its training: a section of its record, computed once.

Weights stay out of records, so this keeps means over modules, by decoder layer where layers differ. It asks the model
for the routing of a few validation prompts a task; all else is read from the factors.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

import malora
from bench.runtime.logits import label_positions_only
from malora.analysis import Experts, extract_experts, load_experts, means, movement, similarities, spectra

PROMPTS = 32  # a task; one forward pass, some thousand tokens
MAX_TOKENS = 512  # of a prompt


def analyze_adapter(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, start: Experts, prompts: dict[str, list[str]],
    peers: dict[str, Path],
) -> dict[str, Any]:  # fmt: skip
    """What the paper's Figures 2 and 3 show of an adapter, and what they do not.

    Args:
        model: a trained PEFT model with a router.
        start: its experts before training.
        prompts: by task, of items that are not scored.
        peers: folders of other adapters, by what they are compared as; one that does not exist is left out.

    Returns:
        similarity: by what is compared ("within" the model, "start", the peers) and statistic, by side [value, chance].
        spectra: by side: values, singular values of the stacked experts in descending order, means over modules;
            stable_rank and effective_rank.
        movement: of S, or of A where there is none: relative, by layer, and angle, mean principal angle in degrees.
        routing: by decoder layer; see `_routing`.
    """
    now = extract_experts(model)
    others = {name: load_experts(folder) for name, folder in peers.items() if folder.is_dir()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small matrices: several threads take seven times as long
    alike = {"within": _similarity(now), "start": _similarity(start)}
    alike |= {name: _similarity(now, other) for name, other in others.items()}
    found = {"similarity": alike, "spectra": _spectra(now), "movement": _movement(now, start)}
    torch.set_num_threads(threads)
    return found | {"routing": _routing(model, tokenizer, prompts)}


def _similarity(one: Experts, other: Experts | None = None) -> dict[str, dict[str, Any]]:
    records = similarities(one, other)
    return {statistic: means(records, statistic) for statistic in ("mean", "mean_square")}


def _spectra(now: Experts) -> dict[str, dict[str, Any]]:
    by_side = defaultdict(list)
    for spectrum in spectra(now):
        by_side[spectrum.projection].append(spectrum)
    return {
        side: {
            "values": [float(np.mean(v)) for v in _columns([s.values for s in found])],
            "stable_rank": _mean([s.stable_rank for s in found]),
            "effective_rank": _mean([s.effective_rank for s in found]),
        }
        for side, found in by_side.items()
    }


def _columns(lists: list[list[float]]) -> list[list[float]]:
    """The first values of all lists, the second ones, and so on; a narrow module has fewer."""
    return [[v for v in column if v is not None] for column in itertools.zip_longest(*lists)]


def _movement(now: Experts, start: Experts) -> dict[str, Any]:
    factor = "A" if next(iter(start.values())).S is None else "S"
    moved = movement(now, start, factor=factor)
    by_layer = defaultdict(list)
    for one in moved:
        by_layer[_layer(one.module)].append(one.relative)
    angle = np.degrees(np.mean([np.mean(one.angles) for one in moved]))
    return {"factor": factor, "relative": [_mean(by_layer[i]) for i in sorted(by_layer)], "angle": float(angle)}


@torch.no_grad()
def _routing(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[str]]) -> dict[str, Any]:
    """Means over a layer's routers, whose experts have nothing to do with each other.

    Returns:
        entropy, largest_share, unused: task -> [layers]; nats, share of the assignments, number of experts.
        load: [layers, N] shares of the assignments, each router's in descending order, tasks weighted alike.
        task_information: [layers] mutual information of task and expert in nats, tasks weighted alike: 0 for routing
            that does not depend on the task.
    """
    was_training = model.training
    model.eval()
    stats = {}
    for task, texts in prompts.items():
        ids = [torch.tensor(tokenizer(text)["input_ids"][:MAX_TOKENS]) for text in texts[:PROMPTS]]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
        ids = pad_sequence(ids, batch_first=True).to(model.device)
        nowhere = torch.zeros(1, dtype=torch.long, device=model.device)  # all logits would be gigabytes, and unread
        precision = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
        with precision, label_positions_only(model, nowhere, nowhere):
            model(input_ids=ids, attention_mask=mask)
        stats[task] = malora.router_stats(model)
    model.train(was_training)
    layers = defaultdict(list)
    for module in next(iter(stats.values())):
        layers[_layer(module)].append(module)
    modules = [layers[i] for i in sorted(layers)]
    shares = {m: np.array([by_module[m].share for by_module in stats.values()]) for group in modules for m in group}

    def by_task(value) -> dict[str, list[float]]:
        return {task: [_mean([value(s[m]) for m in group]) for group in modules] for task, s in stats.items()}

    return {
        "entropy": by_task(lambda s: s.entropy),
        "largest_share": by_task(lambda s: max(s.share)),
        "unused": by_task(lambda s: len(s.unused)),
        "load": [np.mean([np.sort(shares[m].mean(0))[::-1] for m in group], 0).tolist() for group in modules],
        "task_information": [
            _mean([_entropy(shares[m].mean(0)) - np.mean([*map(_entropy, shares[m])]) for m in group])
            for group in modules
        ],
    }


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _mean(values: list[float | None]) -> float | None:
    """None for values that are not there, as a zero matrix has no rank."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _layer(module: str) -> int:
    """The decoder layer in a module's name, which is its first number."""
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)
