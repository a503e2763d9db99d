"""Load-balancing loss and router statistics of a model.

Shapes: B batch, S sequence length, N experts, L layers whose routings have the same shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from malora.layer import MaloraLayer
from malora.routing import Routing

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RouterStats:
    """Statistics of one layer's router over the tokens of a forward pass.

    Attributes:
        share: Share of each expert in all top-k assignments, N values that sum to 1.
        probability: Mean probability of each expert, N values that sum to 1.
        entropy: Mean entropy of the probabilities in nats; log(N) for a uniform router.
        gate_sum: Mean sum of a token's top-k probabilities, by which its update is scaled.
    """

    share: list[float]
    probability: list[float]
    entropy: float
    gate_sum: float

    @property
    def unused(self) -> list[int]:
        """Indices of the experts that got no token."""
        return [t for t, share in enumerate(self.share) if share == 0]


def balance_loss(
    model: nn.Module, attention_mask: Tensor | None = None, *, all_reduce: AllReduce | None = None
) -> Tensor:
    """Compute the load-balancing loss of the last forward pass, a float32 scalar.

        N Σ_t f_t p_t

    f_t is the share of expert t in the top-k assignments, p_t its mean probability, both over tokens that are not
    padding. A perfectly even router has a loss of 1 for every N and k. The formula is that of Switch Transformer
    (arXiv 2101.03961, equation 4). The MALoRA paper gives only the weight of the loss (0.01 or 0.001). We take the
    mean over layers, not the sum, so that the same weight works for every depth.

    Several processes may each have a part of the tokens. The loss of all tokens is not the mean of the processes'
    losses, because it is a product of two means. With `all_reduce`, f_t and p_t are those of all tokens, and each
    process gets its summand of the loss. DistributedDataParallel averages gradients, so multiply the summand by the
    number of processes there.

    Args:
        model: Model from `get_peft_model`, after a forward pass.
        attention_mask: [B, S], nonzero for tokens that count. Defaults to the mask of that forward pass.
        all_reduce: Sums a tensor without gradient over all processes. All of them must call this function. Defaults
            to the tokens of this process alone.

    Raises:
        ValueError: The model has no router, has not run yet, or its routing carries no gradient.
    """
    losses, layers = [], 0
    for routing, _, mask in _stacked_routings(model, attention_mask):
        if torch.is_grad_enabled() and model.training and not routing.probability.requires_grad:
            raise ValueError(
                "the routing of the last forward pass carries no gradient, so a balance loss would train nothing; "
                "use gradient checkpointing with use_reentrant=False, or torch.no_grad() to measure only."
            )
        share = _share(routing, mask, all_reduce)
        # The sum is this process's, because gradients are added up over processes.
        probability = (routing.probability * mask).sum((1, 2)) / _reduced(mask.sum(), all_reduce)
        losses.append(routing.probability.shape[-1] * (share * probability).sum())
        layers += len(share)
    return torch.stack(losses).sum() / layers


@torch.no_grad()
def router_stats(
    model: nn.Module, attention_mask: Tensor | None = None, *, all_reduce: AllReduce | None = None
) -> dict[str, RouterStats]:
    """Compute the statistics of every router in the last forward pass, by module name.

    Args:
        model: Model from `get_peft_model`, after a forward pass.
        attention_mask: [B, S], nonzero for tokens that count. Defaults to the mask of that forward pass.
        all_reduce: Sums a tensor over all processes, for statistics of their tokens together. All of them must call
            this function. Defaults to the tokens of this process alone.

    Raises:
        ValueError: The model has no router, or has not run yet.
    """
    stats = {}
    for routing, modules, mask in _stacked_routings(model, attention_mask):
        p = routing.probability
        entropy = _mean(torch.special.entr(p).sum(-1, keepdim=True), mask, all_reduce)[:, 0]
        gate_sum = _mean(routing.gate.sum(-1, keepdim=True), mask, all_reduce)[:, 0]
        fields = (_share(routing, mask, all_reduce), _mean(p, mask, all_reduce), entropy, gate_sum)
        for module, *values in zip(modules, *(field.tolist() for field in fields), strict=True):
            stats[module] = RouterStats(*values)
    return stats


def has_router(model: nn.Module) -> bool:
    """Return whether an active adapter of the model has a router.

    `balance_loss` needs one.
    """
    return any(layer.has_active_router for layer in _layers(model))


def _layers(model: nn.Module) -> Iterator[MaloraLayer]:
    return (module for module in model.modules() if isinstance(module, MaloraLayer))


def _stacked_routings(model: nn.Module, attention_mask: Tensor | None) -> Iterator[tuple[Routing, list[str], Tensor]]:
    """Yield routings of equal shape as one, with module names and token weights.

    The probabilities are [L, B, S, N] and the weights [B, S, 1]. A model has hundreds of routers. Statistics of each
    router by itself would cost hundreds of small kernels per step.

    Raises:
        ValueError: Nothing was routed, or the mask does not fit the tokens.
    """
    groups = defaultdict(list)
    for layer in _layers(model):
        log = layer.routing_log
        mask = attention_mask if attention_mask is not None or log is None else log.attention_mask
        for routing in layer.routings.values():
            groups[routing.probability.shape, routing.top_k].append((layer.name, routing.probability, mask))
    if not groups:
        reason = "run a forward pass first" if has_router(model) else "it has no adapter with more than one expert"
        raise ValueError(f"nothing was routed in this model: {reason}.")
    for (shape, top_k), group in groups.items():
        modules, probabilities, (mask, *_) = zip(*group, strict=True)
        stacked = Routing(torch.stack(probabilities), top_k)
        yield stacked, list(modules), _token_weights(mask, shape, stacked.probability)


def _token_weights(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the weight of each token: 1 if it counts, 0 if it is padding.

    The weights are [B, S, 1] in the dtype of `like`.
    """
    if mask is None:
        return like.new_ones(*shape[:-1], 1)
    # With a key-value cache the mask covers earlier passes too. The tokens of this pass are the last ones.
    mask = mask[:, -shape[1] :]
    if mask.shape != shape[:-1]:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but the tokens routed are {tuple(shape[:-1])}.")
    return (mask != 0).to(like.dtype).unsqueeze(-1)


def _reduced(tensor: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """Sum a tensor over the processes, or return it if there is only this one."""
    return tensor if all_reduce is None else all_reduce(tensor)


def _mean(values: Tensor, weights: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """Compute the weighted mean over batch, sequence and processes, [L, C].

    The values are [L, B, S, C] and the weights [B, S, 1].
    """
    return _reduced((values * weights).sum((1, 2)), all_reduce) / _reduced(weights.sum(), all_reduce)


def _share(routing: Routing, weights: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """Compute the share of each expert in the weighted assignments: [L, N]."""
    counts = _reduced((routing.chosen * weights).sum((1, 2)), all_reduce)
    return counts / counts.sum(-1, keepdim=True)
