"""A quick measurement of a model's speed on a CPU, before a run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from bench.runs.work import FLOPS_PER_WEIGHT

MIN_WEIGHTS = 50_000_000  # smaller models have their first step soon
MAX_TOKENS = 512  # of a pass; with 128, waiting of threads for each other took most of it on a busy machine
PASSES = 2  # the faster one counts


@torch.no_grad()
def seconds_per_trained_token(model: nn.Module, examples: Sequence[Sequence[int]]) -> float | None:
    """Return about how long training takes per token, or None for a small model.

    It is measured by forward passes. The model is in training mode afterwards, and random numbers are those of before.

    Args:
        model: The model with its adapter, on a CPU.
        examples: Token ids of training examples.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < MIN_WEIGHTS:
        return None
    length = min(MAX_TOKENS, getattr(getattr(model, "config", None), "max_position_embeddings", MAX_TOKENS))
    ids = [token for example in examples[:MAX_TOKENS] for token in example][:length]
    model.eval()
    seconds = math.inf
    for _ in range(PASSES):
        start = time.perf_counter()
        model(input_ids=torch.tensor([ids]), use_cache=False)
        seconds = min(seconds, time.perf_counter() - start)
    model.train()
    return seconds / len(ids) * FLOPS_PER_WEIGHT["training"] / FLOPS_PER_WEIGHT["scoring"]
