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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from malora.adapter_rows import AdapterRows


class Routing(NamedTuple):
    """Decision of a router for every token.

    Attributes:
        probability: Probability of every expert, [B, S, N] or [T, N], float32 or wider. If the rows of the batch belong
            to different adapters, B counts the rows of one.
        top_k: Number of experts per token, k.
        renormalize: Whether the gates of a token are divided by their sum.
    """

    probability: Tensor
    top_k: int
    renormalize: bool = False

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
        """Gate of every expert, [B, S, N].

        It is the probability of the top k experts, and 0 for the others (equation 4). So the sum of a token's gates is
        below 1, unless they are renormalised.
        """
        return self._renormalized(self.probability * self.chosen)

    def gate_of(self, experts: Tensor) -> Tensor:
        """Return the gates of the chosen experts, [..., k]; `experts` are their indices, as `experts` returns them."""
        return self._renormalized(self.probability.gather(-1, experts))

    def _renormalized(self, gate: Tensor) -> Tensor:
        """Divide the gates of each token by their sum if the routing says so."""
        return gate / gate.sum(-1, keepdim=True) if self.renormalize else gate


def route(x: Tensor, weight_Nn: Tensor, top_k: int, renormalize: bool = False) -> Routing:
    """Compute softmax(W_g x) for x [..., n] (equation 4).

    The top k experts and their gates follow from it. The softmax is computed in float32, or in the dtype of x if that
    is wider.
    """
    return Routing(expert_probabilities(F.linear(x, weight_Nn)), top_k, renormalize)


def expert_probabilities(logits: Tensor) -> Tensor:
    """Compute the softmax over the last dimension in float32, or in the dtype of the logits if that is wider."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


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


class LayerRecord:
    """Routing of one layer in the last forward pass of its model.

    Each layer has a record of its own. In a container that all layers share, torch.compile would guard the layer's name
    and the number of earlier entries, and so compile every decoder layer again.

    Attributes:
        routings: Routings, by adapter.
        waiting: Gradients that wait for the second run of the layer under reentrant gradient checkpointing, by adapter
            (`malora.checkpointing`).
    """

    def __init__(self) -> None:
        self.routings: dict[str, Routing] = {}
        self.waiting: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget the last pass."""
        self.routings = {}
        for gradients in self.waiting.values():  # kept, because the autograd graphs of earlier passes refer to them
            gradients.clear()

    def __reduce__(self) -> tuple[type[LayerRecord], tuple[()]]:
        """Copy or pickle the record as an empty one: a tensor with an autograd graph cannot be copied."""
        return LayerRecord, ()


class PassSnapshot(NamedTuple):
    """What a `RoutingLog` knows of one forward pass, without autograd graphs.

    Attributes:
        routings: Routings of the pass, by the layer's name and the adapter's.
        attention_mask: As in `RoutingLog`.
        decoder_attention_mask: As in `RoutingLog`.
        rows: The adapter of each row of the batch, if the pass had `adapter_names`.
    """

    routings: dict[str, dict[str, Routing]]
    attention_mask: Tensor | None
    decoder_attention_mask: Tensor | None
    rows: AdapterRows | None


class RoutingLog:
    """Routing of the last forward pass of a model.

    Layers record only while the model's own `forward` runs. Gradient checkpointing runs a layer a second time during
    `backward`. If that pass were recorded, its activations would never be freed.

    A routing leads to the autograd graph, and under gradient checkpointing the graph leads to the layers. Python's
    garbage collector does not see references through the graph. So the model owns the log and its records, and layers
    refer to them weakly (`WeakReference`): a model without other references is then freed.

    Attributes:
        attention_mask: Padding mask of that pass, [B, S]; None if every token counts.
        decoder_attention_mask: The same for the decoder of an encoder-decoder model.
        is_encoder_decoder: Whether the model has an encoder, to which `attention_mask` belongs, and a decoder.
        records: What each layer keeps, by its name.
        recording: Whether layers record now.
        has_gradients: Whether that pass ran with gradients.
        rows: The adapter of each row of the batch, which layers use now; None if all rows use the active adapters.
        recorded_rows: The same for the last pass.
        stacks: Stacks of adapters that passes with `rows` use (`malora.adapter_stack`).
    """

    def __init__(self) -> None:
        self.attention_mask: Tensor | None = None
        self.decoder_attention_mask: Tensor | None = None
        self.is_encoder_decoder = False
        self.records: dict[str, LayerRecord] = {}
        self.recording = False
        self.has_gradients = False
        self.rows: AdapterRows | None = None
        self.recorded_rows: AdapterRows | None = None
        self.stacks: Sequence[Any] = ()

    def record_of(self, layer: str) -> LayerRecord:
        """Return the record of the layer of this name."""
        return self.records.setdefault(layer, LayerRecord())

    @property
    def routings(self) -> dict[str, dict[str, Routing]]:
        """Routings of the last pass, by the layer's name and the adapter's."""
        return {name: record.routings for name, record in self.records.items() if record.routings}

    @routings.setter
    def routings(self, routings: dict[str, dict[str, Routing]]) -> None:
        for name, record in self.records.items():
            record.routings = dict(routings.get(name, {}))

    def start(self, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None = None) -> None:
        """Forget the last pass and record the one that begins.

        Args:
            attention_mask: Padding mask of the pass, [B, S]; None if every token counts.
            decoder_attention_mask: The same for the decoder of an encoder-decoder model.
        """
        self.attention_mask, self.decoder_attention_mask = attention_mask, decoder_attention_mask
        self.recording, self.has_gradients = True, torch.is_grad_enabled()
        self.recorded_rows = self.rows
        for record in self.records.values():
            record.clear()

    def stop(self) -> None:
        """Record no more. What was recorded stays."""
        self.recording = False

    def snapshot(self) -> PassSnapshot:
        """Return what the log knows of the last pass. The tensors are the pass's own."""
        routings = {
            layer: {adapter: kept._replace(probability=kept.probability.detach()) for adapter, kept in of_layer.items()}
            for layer, of_layer in self.routings.items()
        }
        return PassSnapshot(routings, self.attention_mask, self.decoder_attention_mask, self.recorded_rows)

    def restore(self, snapshot: PassSnapshot) -> None:
        """Make a pass of earlier the last one, after a replay of it."""
        self.routings = snapshot.routings
        self.attention_mask, self.decoder_attention_mask = snapshot.attention_mask, snapshot.decoder_attention_mask
        self.recorded_rows = snapshot.rows
        self.has_gradients = False

    @contextmanager
    def record(self, attention_mask: Tensor | None) -> Iterator[None]:
        """Record the forward pass inside the `with` block; the arguments are those of `start`."""
        self.start(attention_mask)
        try:
            yield
        finally:
            self.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the log with empty records. The layers of the copy refer to them."""
        return vars(RoutingLog()) | {"records": self.records}


T = TypeVar("T")


class WeakReference(Generic[T]):
    """A weak reference that can be copied and pickled, unlike `weakref.ref`.

    The copy of a model's layer refers to the log of the copied model.

    Args:
        target: The object; None for a reference to nothing.
    """

    def __init__(self, target: T | None) -> None:
        self._reference = None if target is None else weakref.ref(target)

    def __call__(self) -> T | None:
        """Return the object, or None if it is gone."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[WeakReference[T]], tuple[Any]]:
        return WeakReference, (self(),)
