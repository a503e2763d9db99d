"""Match the scale of a run's gates on its first batch (`MaloraConfig.match_scale`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel

import malora
from bench.records.schema import RunConfig
from bench.train.batching import Encoded, shuffled_batches

ROWS_PER_PASS = 8  # bounds the memory of the logits


def match_first_batch(
    model: PeftModel,
    adapter: str,
    encoded: Sequence[Encoded],
    config: RunConfig,
    pad_id: int,
    *,
    is_joint: bool = False,
) -> float | None:
    """Match an adapter's scale if its config asks for it.

    The adapter must be as it was made: a run that continues from a checkpoint measures before it loads that.

    Args:
        model: Model with the adapter.
        adapter: Its name.
        encoded: Training examples of the run.
        config: Configuration of the run.
        pad_id: Token id of padding.
        is_joint: Whether the model has adapters of other runs too.

    Returns:
        The mean sum of the gates, or None if the config does not ask for it.
    """
    settings = model.peft_config[adapter]
    if not getattr(settings, "match_scale", False):
        return None
    batches = shuffled_batches(len(encoded), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    first = [encoded[i].ids for i in batches[0]]
    device = next(model.parameters()).device
    inputs: Iterator[dict[str, Any]] = (
        _padded(first[start : start + ROWS_PER_PASS], pad_id, device) for start in range(0, len(first), ROWS_PER_PASS)
    )
    if is_joint:
        inputs = (batch | {"adapter_names": [adapter] * len(batch["input_ids"])} for batch in inputs)
    return malora.match_gate_scale(model, inputs, adapter=adapter)


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Return sequences as one batch, padded on the right."""
    length = max(map(len, rows))
    ids = [[*row, *[pad_id] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "use_cache": False,
    }
