"""Top-k routing of tokens to experts.

| symbol | meaning |
| --- | --- |
| B, S | batch and sequence length |
| n | inputs of the layer |
| N | experts |
| k | experts per token, `top_k` |

The routing of a model's last forward pass is kept in its `RoutingLog` until the next one. `malora.balance_loss` and
`malora.router_stats` read it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Decision of a router for every token.

    Attributes:
        probability: Probability of every expert, [B, S, N] or [T, N], float32 or wider.
        top_k: Number of experts per token, k.
    """

    probability: Tensor
    top_k: int

    @property
    def chosen(self) -> Tensor:
        """Mask of the top k experts, [B, S, N]: 1 for a used expert, 0 for the others."""
        return top_k_mask(self.probability, self.top_k)

    @property
    def experts(self) -> Tensor:
        """Indices of the top k experts, the most probable first: [B, S, k], int64."""
        return torch.cat(top_k_indices(self.probability, self.top_k), -1)

    @property
    def gate(self) -> Tensor:
        """Gate g of equation 4, [B, S, N].

        It is the probability of the top k experts, and 0 for the others. The gates of a token are not renormalised, so
        their sum is below 1.
        """
        return self.probability * self.chosen


def route(x: Tensor, weight_Nn: Tensor, top_k: int) -> Routing:
    """Compute softmax(W_g x) for x [..., n] (equation 4).

    The top k experts follow from it. The softmax is computed in float32, or in the dtype of x if that is wider.
    """
    logits = F.linear(x, weight_Nn)
    return Routing(logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)), top_k)


def top_k_mask(probability: Tensor, top_k: int) -> Tensor:
    """Return 1 for the k largest values of the last dimension and 0 elsewhere.

    Of equal values the first is taken. The mask has the shape and dtype of `probability` and carries no gradient.
    """
    mask = torch.zeros_like(probability.detach())
    expert = torch.arange(probability.shape[-1], device=probability.device)
    for index in top_k_indices(probability, top_k):
        mask = mask + (expert == index)
    return mask


def top_k_indices(probability: Tensor, top_k: int) -> list[Tensor]:
    """Return the indices of the k largest values of the last dimension.

    They are k tensors [..., 1], int64, the largest value's first. Of equal values the first is taken. The k maxima are
    found one after the other, because a compiler can fuse that with the softmax. `torch.topk` would need kernels of its
    own.
    """
    remaining = probability.detach()
    expert = torch.arange(probability.shape[-1], device=probability.device)
    indices = []
    for _ in range(top_k):
        index = remaining.argmax(-1, keepdim=True)
        indices.append(index)
        remaining = remaining.masked_fill(expert == index, -1.0)
    return indices


class RoutingLog:
    """Routing of the last forward pass of a model.

    Layers record only while the model's own `forward` runs. Gradient checkpointing runs a layer a second time during
    `backward`. If that pass were recorded, its activations would never be freed.

    A routing leads to the autograd graph, and under gradient checkpointing the graph leads to the layers. Python's
    garbage collector does not see references through the graph. So the model owns the log, and its layers refer to it
    weakly (`RoutingLogReference`): a model without other references is then freed.

    Attributes:
        attention_mask: Padding mask of that pass, [B, S]; None if every token counts.
        decoder_attention_mask: The same for the decoder of an encoder-decoder model.
        is_encoder_decoder: Whether the model has an encoder, to which `attention_mask` belongs, and a decoder.
        routings: Routings of that pass, by the layer's name and the adapter's.
        recording: Whether layers record now.
        has_gradients: Whether that pass ran with gradients.
        waiting: Gradients that wait for the second run of a layer under reentrant gradient checkpointing, by the
            layer's name and the adapter's (`malora.checkpointing`).
    """

    def __init__(self) -> None:
        self.attention_mask: Tensor | None = None
        self.decoder_attention_mask: Tensor | None = None
        self.is_encoder_decoder = False
        self.routings: dict[str, dict[str, Routing]] = {}
        self.recording = False
        self.has_gradients = False
        self.waiting: dict[tuple[str, str], list[Tensor]] = {}

    def start(self, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None = None) -> None:
        """Forget the last pass and record the one that begins.

        Args:
            attention_mask: Padding mask of the pass, [B, S]; None if every token counts.
            decoder_attention_mask: The same for the decoder of an encoder-decoder model.
        """
        self.attention_mask, self.decoder_attention_mask = attention_mask, decoder_attention_mask
        self.routings = {}
        self.recording, self.has_gradients = True, torch.is_grad_enabled()
        for gradients in self.waiting.values():  # kept, because the autograd graphs of earlier passes refer to them
            gradients.clear()

    def stop(self) -> None:
        """Record no more. What was recorded stays."""
        self.recording = False

    @contextmanager
    def record(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Record the forward pass inside the `with` block; the arguments are those of `start`."""
        self.start(attention_mask)
        try:
            yield
        finally:
            self.stop()

    def __reduce__(self) -> tuple[type[RoutingLog], tuple[()]]:
        """Copy or pickle the log as an empty one: a tensor with an autograd graph cannot be copied."""
        return RoutingLog, ()


class RoutingLogReference:
    """A weak reference to a routing log.

    Unlike `weakref.ref` it can be copied and pickled. The copy of a model's layer refers to the log of the copied
    model.

    Args:
        log: The log; None for a reference to nothing.
    """

    def __init__(self, log: RoutingLog | None) -> None:
        self._reference = None if log is None else weakref.ref(log)

    def __call__(self) -> RoutingLog | None:
        """Return the log, or None if its model is gone."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[RoutingLogReference], tuple[Any]]:
        return RoutingLogReference, (self(),)
