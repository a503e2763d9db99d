"""Load-balancing loss and router statistics of a model.

Shapes: B batch, S sequence length, T tokens (B·S), N experts, L layers whose routings have the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from malora.checkpointing import defer_gradient
from malora.layer import MaloraLayer
from malora.routing import Routing, RoutingLog

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RouterStats:
    """Statistics of one layer's router over the tokens of a forward pass.

    Attributes:
        share: Share of each expert in all top-k assignments, N values that sum to 1.
        probability: Mean probability of each expert, N values that sum to 1.
        entropy: Mean entropy of the probabilities in nats; log(N) for a uniform router.
        gate_sum: Mean sum of a token's gates, by which its update is scaled.
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
    model: nn.Module,
    attention_mask: Tensor | None = None,
    *,
    all_reduce: AllReduce | None = None,
    adapter: str | None = None,
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
        adapter: Adapter whose routers count. By default the loss is the mean over the routers of all adapters that
            took part. With `adapter_names`, each adapter counts the tokens of its own rows.

    Raises:
        ValueError: The model has no router, has not run yet, or its routing carries no gradient.
    """
    stacks = list(_stacked_routings(_layers(model), attention_mask, adapter=adapter))
    has_gradient = any(stack.routing.probability.requires_grad for stack in stacks)
    if torch.is_grad_enabled() and model.training and not has_gradient and _trains_router(model):
        raise ValueError(
            "the routing of the last forward pass carries no gradient, so a balance loss would train nothing: the pass "
            "ran without gradients. To measure only, use torch.no_grad() here, too."
        )
    return _mean_over_layers(stacks, all_reduce)


def balance_loss_by_adapter(layers: Sequence[MaloraLayer], adapters: Iterable[str]) -> dict[str, Tensor]:
    """Compute the balance loss of some adapters in the last forward pass, each by itself.

    An adapter that routed nothing in that pass is left out.

    Args:
        layers: All adapted layers of the model.
        adapters: Names of adapters.
    """
    stacks = {name: list(_stacked_routings(layers, None, adapter=name, if_any=True)) for name in adapters}
    return {name: _mean_over_layers(of_adapter) for name, of_adapter in stacks.items() if of_adapter}


def _mean_over_layers(stacks: list[_Stack], all_reduce: AllReduce | None = None) -> Tensor:
    losses, layers = [], 0
    for routing, modules, weights in stacks:
        share = _share(routing, weights, all_reduce)
        # The sum is this process's, because gradients are added up over processes.
        probability = (routing.probability * weights).sum(1) / _reduced(weights.sum(), all_reduce).clamp(min=1)
        losses.append(routing.probability.shape[-1] * (share * probability).sum())
        layers += len(modules)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / layers


@torch.no_grad()
def router_stats(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    *,
    all_reduce: AllReduce | None = None,
    adapter: str | None = None,
) -> dict[str, RouterStats]:
    """Compute the statistics of every router in the last forward pass, by module name.

    Args:
        model: Model from `get_peft_model`, after a forward pass.
        attention_mask: [B, S], nonzero for tokens that count. Defaults to the mask of that forward pass.
        all_reduce: Sums a tensor over all processes, for statistics of their tokens together. All of them must call
            this function. Defaults to the tokens of this process alone.
        adapter: Adapter whose routers count; needed if several took part.

    Raises:
        ValueError: The model has no router, or has not run yet; or several adapters took part and none is named.
    """
    stats: dict[str, RouterStats] = {}
    for routing, modules, mask in _stacked_routings(_layers(model), attention_mask, adapter=adapter):
        p = routing.probability
        entropy = _mean(torch.special.entr(p).sum(-1, keepdim=True), mask, all_reduce)[:, 0]
        gate_sum = _mean(routing.gate.sum(-1, keepdim=True), mask, all_reduce)[:, 0]
        fields = (_share(routing, mask, all_reduce), _mean(p, mask, all_reduce), entropy, gate_sum)
        for module, *values in zip(modules, *(field.tolist() for field in fields), strict=True):
            if module in stats:
                raise ValueError(f"several adapters routed tokens in {module}; name one of them as adapter=.")
            stats[module] = RouterStats(*values)
    return stats


@torch.no_grad()
def router_summary(model: nn.Module) -> dict[str, Tensor]:
    """Summarize the routers in the last forward pass, without waiting for the device.

    Returns:
        Scalars: `entropy` and `largest_share`, each a mean over the routers, and `unused_experts`, the number of
        experts without a token over all routers. Nothing if nothing was routed.
    """
    entropies, largest, unused = [], [], []
    for routing, _, weights in _stacked_routings(_layers(model), None, if_any=True):
        share = _share(routing, weights)
        entropies.append(_mean(torch.special.entr(routing.probability).sum(-1, keepdim=True), weights)[:, 0])
        largest.append(share.amax(-1))
        unused.append((share == 0).sum(-1))
    if not entropies:
        return {}
    device = entropies[0].device
    found = {"entropy": entropies, "largest_share": largest, "unused_experts": unused}
    by_name = {name: torch.cat([value.to(device, torch.float) for value in values]) for name, values in found.items()}
    return {name: each.sum() if name == "unused_experts" else each.mean() for name, each in by_name.items()}


def has_router(model: nn.Module) -> bool:
    """Return whether an active adapter of the model has a router.

    `balance_loss` needs one.
    """
    return any(layer.has_active_router for layer in _layers(model))


def _trains_router(model: nn.Module) -> bool:
    routers = (layer.router(adapter) for layer in _layers(model) for adapter in layer.routings)
    return any(router is not None and router.requires_grad for router in routers)


def _layers(model: nn.Module) -> list[MaloraLayer]:
    return [module for module in model.modules() if isinstance(module, MaloraLayer)]


class _Stack(NamedTuple):
    """Routings of equal shape.

    Attributes:
        routing: Probabilities [L, T, N].
        modules: Names of the L layers.
        weights: 1 for a token that counts and 0 for padding, [T, 1] in the dtype of the probabilities.
    """

    routing: Routing
    modules: list[str]
    weights: Tensor


class _Kept(NamedTuple):
    """A routing that a layer keeps, and the padding mask of its tokens."""

    layer: MaloraLayer
    adapter: str
    routing: Routing
    mask: Tensor | None

    def stacks_with(self, other: _Kept) -> bool:
        """Return whether both routings fit into one tensor and have one mask."""
        mine, theirs = self.routing.probability, other.routing.probability
        is_alike = self.routing[1:] == other.routing[1:] and self.mask is other.mask and mine.device == theirs.device
        return is_alike and mine.shape == theirs.shape


def _stacked_routings(
    layers: Sequence[MaloraLayer], attention_mask: Tensor | None, *, adapter: str | None = None, if_any: bool = False
) -> Iterator[_Stack]:
    """Yield routings of equal shape as one.

    A model has hundreds of routers. Statistics of each router by itself would cost hundreds of small kernels per step.

    Args:
        layers: All adapted layers of a model, after a forward pass.
        attention_mask: Mask that replaces the one of that pass.
        adapter: Yield only routings of this adapter; None for all adapters.
        if_any: Yield nothing if nothing was routed, instead of raising an error.

    Raises:
        ValueError: Nothing was routed, or the mask does not fit the tokens.
    """
    groups: list[list[_Kept]] = []
    masks: dict[tuple[str, int], Tensor] = {}  # by adapter and whole mask
    for layer in layers:
        log = layer.routing_log
        for name, routing in layer.routings.items():
            if log is None or adapter not in (None, name) or routing.probability.numel() == 0:
                continue
            mask = attention_mask
            if mask is None:
                mask = _mask_of(layer, log, name, masks, routing.probability.shape[:-1])
            else:
                mask = _rows_of(name, mask, log, masks)
            kept = _Kept(layer, name, routing, mask)
            # Not in a dictionary by shape: torch.compile would make a graph for every length.
            found = next((group for group in groups if group[0].stacks_with(kept)), None)
            if found is None:
                groups.append([kept])
            else:
                found.append(kept)
    if not groups and not if_any:
        has_any = any(layer.has_active_router for layer in layers)
        reason = "run a forward pass first" if has_any else "it has no adapter with more than one expert"
        if adapter is not None:
            reason = f"adapter {adapter!r} has no router, or had no row in the last forward pass"
        raise ValueError(f"nothing was routed in this model: {reason}.")
    for group in groups:
        first, shape = group[0], group[0].routing.probability.shape
        probabilities = [_with_gradient(kept.layer, kept.adapter, kept.routing.probability) for kept in group]
        stacked = torch.stack(probabilities).reshape(len(group), -1, shape[-1])
        weights = _token_weights(first.mask, shape, stacked)
        yield _Stack(first.routing._replace(probability=stacked), [kept.layer.name for kept in group], weights)


def _rows_of(adapter: str, mask: Tensor, log: RoutingLog, masks: dict[tuple[str, int], Tensor]) -> Tensor:
    """Return an adapter's rows of a mask [B, S].

    They are kept in `masks`, because routings stack only if their mask is the same object.
    """
    if log.recorded_rows is None:
        return mask
    key = adapter, id(mask)
    if key not in masks:
        masks[key] = log.recorded_rows.select(adapter, mask)
    return masks[key]


def _mask_of(
    layer: MaloraLayer, log: RoutingLog, adapter: str, masks: dict[tuple[str, int], Tensor], tokens: torch.Size
) -> Tensor | None:
    """Return the padding mask of the last forward pass that fits a layer's tokens [B, S] or [B·S], or None."""
    mask, decoder_mask = (
        None if found is None else _rows_of(adapter, found, log, masks)
        for found in (log.attention_mask, log.decoder_attention_mask)
    )
    parts = layer.name.split(".")
    if log.is_encoder_decoder and "decoder" in parts:
        # Keys and values of cross attention read the encoder's tokens.
        is_cross = re.search("enc|cross", "".join(parts[parts.index("decoder") + 2 :]), re.IGNORECASE)
        reads_encoder = is_cross and mask is not None and mask.shape == tokens
        mask = mask if reads_encoder else decoder_mask
    return mask if mask is not None and _fit(mask, tokens) is not None else None


def _fit(mask: Tensor, tokens: torch.Size) -> Tensor | None:
    """Return the mask of a layer's tokens [B, S] or [B·S], or None if it does not fit them."""
    if len(tokens) == 1 and mask.numel() == tokens[0]:  # some models, such as OPT, flatten batch and sequence
        return mask.reshape(tokens)
    if len(tokens) != 2:
        return None
    # With a key-value cache the mask covers earlier passes too. The tokens of this pass are the last ones.
    mask = mask[:, -tokens[1] :]
    return mask if mask.shape == tokens else None


def _with_gradient(layer: MaloraLayer, adapter: str, probability: Tensor) -> Tensor:
    """Return the probability so that its gradient reaches the router under reentrant checkpointing, too."""
    log, router = layer.routing_log, layer.router(adapter)
    if log is None or router is None or not (log.has_gradients and torch.is_grad_enabled() and router.requires_grad):
        return probability
    if probability.requires_grad:
        return probability
    return defer_gradient(probability, layer.waiting_gradients(adapter))


def _token_weights(mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the weight of each token: 1 if it counts, 0 if it is padding.

    The weights are [T, 1] in the dtype of `like`.
    """
    if mask is None:
        return like.new_ones(like.shape[1], 1)
    fitting = _fit(mask, shape[:-1])
    if fitting is None:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but the tokens routed are {tuple(shape[:-1])}.")
    return (fitting != 0).to(like.device, like.dtype).reshape(-1, 1)


def _reduced(tensor: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """Sum a tensor over the processes, or return it if there is only this one."""
    return tensor if all_reduce is None else all_reduce(tensor)


def _mean(values: Tensor, weights: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Compute the weighted mean over tokens and processes, [L, C], for values [L, T, C] and weights [T, 1].

    It is 0 if all tokens are padding.
    """
    return _reduced((values * weights).sum(1), all_reduce) / _reduced(weights.sum(), all_reduce).clamp(min=1)


def _share(routing: Routing, weights: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
    """Compute the share of each expert in the weighted assignments: [L, N]."""
    counts = _reduced((routing.chosen * weights).sum(1), all_reduce)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
