"""Who serves a token, and how evenly the work is spread.

Shapes: B batch, S sequence, N experts. What a forward pass routed is kept until the next one, so that the loss and the
statistics below can be asked for after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    pass


class Routing(NamedTuple):
    """What a router decided: its probabilities [B, S, N], of which the top k serve."""

    probability: Tensor
    top_k: int

    @property
    def chosen(self) -> Tensor:
        """1 for the top k, 0 elsewhere."""
        return largest(self.probability, self.top_k)

    @property
    def experts(self) -> Tensor:
        """The top k by number, the most probable first: [B, S, k]."""
        return torch.cat(_best(self.probability, self.top_k), -1)

    @property
    def gate(self) -> Tensor:
        """g of equation 4: the probability of the top k, zero elsewhere; not renormalised."""
        return self.probability * self.chosen


def route(x: Tensor, weight_Nn: Tensor, top_k: int) -> Routing:
    """TopK(softmax(W_g x)) (eq. 4) for x [..., n]. The softmax is in float32, or wider if x is."""
    logits = F.linear(x, weight_Nn)
    return Routing(logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)), top_k)


def largest(probability: Tensor, top_k: int) -> Tensor:
    """1 for the k largest of the last dimension, 0 elsewhere. Of equals the first.

    One maximum after the other: a compiler fuses that with the softmax, where a sort would be kernels of its own.
    """
    chosen = torch.zeros_like(probability.detach())
    expert = torch.arange(probability.shape[-1], device=probability.device)
    for best in _best(probability, top_k):
        chosen = chosen + (expert == best)
    return chosen


def _best(probability: Tensor, top_k: int) -> list[Tensor]:
    """Places of the k largest of the last dimension, the largest first and of equals the first: k times [..., 1]."""
    remaining = probability.detach()
    expert = torch.arange(probability.shape[-1], device=probability.device)
    found = []
    for _ in range(top_k):
        best = remaining.argmax(-1, keepdim=True)
        found.append(best)
        remaining = remaining.masked_fill(expert == best, -1.0)
    return found


@dataclass
class RoutingLog:
    """Whether layers are to keep what they route, and which tokens count. All layers of a model share one.

    They keep it only while the model's own `forward` runs: when gradient checkpointing runs a layer a second time
    inside `backward`, what that pass routed must not be kept, or its activations would never be freed.
    """

    attention_mask: Tensor | None = None  # [B, S]; None: every token counts
    listening: bool = False

    @contextmanager
    def listen(self, attention_mask: Tensor | None) -> Iterator[None]:
        self.attention_mask = attention_mask
        self.listening = True
        try:
            yield
        finally:
            self.listening = False
