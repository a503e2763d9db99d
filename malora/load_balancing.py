"""Load-balancing loss and router statistics of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from malora.layer import MaloraLayer
from malora.routing import Routing


@dataclass(frozen=True)
class RouterStats:
    """How one layer's router spread its tokens. Lists have an entry an expert."""

    share: list[float]  # of all assignments; sums to 1
    probability: list[float]  # mean over tokens; sums to 1
    entropy: float  # mean over tokens, in nats; log(N) for a router that does not choose
    gate_sum: float  # mean over tokens of the top k's probability: what the update is scaled by

    @property
    def unused(self) -> list[int]:
        return [t for t, share in enumerate(self.share) if share == 0]


def balance_loss(model: nn.Module, attention_mask: Tensor | None = None) -> Tensor:
    """N Σ_t f_t p_t, mean over the routed layers of the last forward pass (Switch Transformer, arXiv 2101.03961).

    f_t is expert t's share of the top-k assignments and p_t its mean probability, over tokens that are not padding; a
    perfectly even router has 1, whatever N and k. The paper gives the factor (0.01 or 0.001) and not the formula. The
    mean, not the sum, over layers keeps that factor's meaning for any depth.

    Args:
        model: what `get_peft_model` returned, after a forward pass.
        attention_mask: [B, S], nonzero for tokens that count; by default the mask of that forward pass.

    Raises:
        ValueError: there is no routed layer, no forward pass, or its routing carries no gradient.
    """
    losses, layers = [], 0
    for routing, _, mask in _stacked(model, attention_mask):
        if torch.is_grad_enabled() and model.training and not routing.probability.requires_grad:
            raise ValueError(
                "the routing of the last forward pass carries no gradient, so a balance loss would train nothing; "
                "use gradient checkpointing with use_reentrant=False, or torch.no_grad() to measure only."
            )
        share, probability = _share(routing, mask), _mean(routing.probability, mask)
        losses.append(routing.probability.shape[-1] * (share * probability).sum())
        layers += len(share)
    return torch.stack(losses).sum() / layers


@torch.no_grad()
def router_stats(model: nn.Module, attention_mask: Tensor | None = None) -> dict[str, RouterStats]:
    """Statistics of every routed layer in the last forward pass, by module name; arguments as in `balance_loss`."""
    stats = {}
    for routing, modules, mask in _stacked(model, attention_mask):
        p = routing.probability
        entropy = _mean(torch.special.entr(p).sum(-1, keepdim=True), mask)[:, 0]
        gate_sum = _mean(routing.gate.sum(-1, keepdim=True), mask)[:, 0]
        columns = (_share(routing, mask), _mean(p, mask), entropy, gate_sum)
        for module, *row in zip(modules, *(column.tolist() for column in columns), strict=True):
            stats[module] = RouterStats(*row)
    return stats


def has_router(model: nn.Module) -> bool:
    """Whether an active adapter of the model routes tokens, so that `balance_loss` has something to balance."""
    return any(layer.routes for layer in _layers(model))


def _layers(model: nn.Module) -> Iterator[MaloraLayer]:
    from malora.layer import MaloraLayer  # it imports this module

    return (module for module in model.modules() if isinstance(module, MaloraLayer))


def _stacked(model: nn.Module, attention_mask: Tensor | None) -> Iterator[tuple[Routing, list[str], Tensor]]:
    """Routings of like shape, stacked to [layers, B, S, N], their modules, and weights [B, S, 1] of their tokens.

    A model has hundreds of routed layers; asking each by itself would cost hundreds of small kernels a step.
    """
    groups = defaultdict(list)
    for layer in _layers(model):
        mask = attention_mask if attention_mask is not None else layer.routing_log.attention_mask
        for routing in layer.routings.values():
            groups[routing.probability.shape, routing.top_k].append((layer.name, routing.probability, mask))
    if not groups:
        why = "run a forward pass first" if has_router(model) else "it has no adapter with more than one expert"
        raise ValueError(f"nothing was routed in this model: {why}.")
    for (shape, top_k), group in groups.items():
        modules, probabilities, (mask, *_) = zip(*group, strict=True)
        stacked = Routing(torch.stack(probabilities), top_k)
        yield stacked, list(modules), _token_weights(mask, shape, stacked.probability)


def _token_weights(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    if mask is None:
        return like.new_ones(*shape[:-1], 1)
    # With a key-value cache the mask covers the past as well; the tokens of this pass are its last ones.
    mask = mask[:, -shape[1] :]
    if mask.shape != shape[:-1]:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but the tokens routed are {tuple(shape[:-1])}.")
    return (mask != 0).to(like.dtype).unsqueeze(-1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over batch and sequence of [layers, B, S, C], weighted by [B, S, 1]: [layers, C]."""
    return (values * weights).sum((1, 2)) / weights.sum()


def _share(routing: Routing, weights: Tensor) -> Tensor:
    counts = (routing.chosen * weights).sum((1, 2))
    return counts / counts.sum(-1, keepdim=True)
