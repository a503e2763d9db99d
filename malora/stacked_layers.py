"""Layers that read the same input, with stacked adapters on rows of their own: all of them computed together.

Q, K and V then share the copy of their input after dropout, the matmul that reads it, and the gate. As on the fused
path, they share one dropout mask, too.

Suffixes: K adapters, T tokens of each, n inputs, N experts, r rank, H = N·r; G layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from malora.backends.batched import batched_down_proj, batched_up_proj
from malora.config import MaloraConfig
from malora.factors import StackedWeights
from malora.fused.eligibility import can_use_kernels
from malora.routing import Routing, expert_probabilities


def stacked_deltas(
    x_KTn: Tensor, weights: StackedWeights, config: MaloraConfig, dropout: nn.Module
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Compute what adapters of one shape add to the outputs of a group's layers.

    Args:
        x_KTn: Tokens of each adapter.
        weights: Weights of the adapters.
        config: Settings of the adapters.
        dropout: Their dropout.

    Returns:
        What they add to each layer's output, [K, T, m]; and the router probabilities of each layer, [K, T, N].
        There are none without a router.
    """
    outputs = batched_down_proj(dropout(x_KTn), weights.down, weights.factors, config.num_experts)
    probabilities: Sequence[Tensor] = ()
    if weights.router is None:
        gated = [(h_KTNr * config.unmatched_scaling).flatten(2) for h_KTNr in outputs]
    else:
        gated, probabilities = _gate(outputs, x_KTn @ weights.router.mT, config)
    pairs = zip(gated, weights.factors, strict=True)
    return [batched_up_proj(h_KTH, factors) for h_KTH, factors in pairs], probabilities


def _gate(outputs: list[Tensor], logits: Tensor, config: MaloraConfig) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Gate each layer's experts.

    Args:
        outputs: Of the down projections of each layer, [K, T, N, r].
        logits: Router logits of all layers, [K, T, G·N].
        config: Settings of the adapters.

    Returns:
        Gated outputs [K, T, N·r] and probabilities [K, T, N] of each layer.
    """
    if can_use_kernels(config, logits.device):
        from malora.fused.gated_experts import gate_experts  # needs Triton

        return gate_experts(outputs, logits, config)
    probabilities = [expert_probabilities(of_layer) for of_layer in logits.chunk(len(outputs), -1)]
    routings = [Routing(probability, config.top_k, config.renormalize) for probability in probabilities]
    gates = [routing.gate * config.unmatched_scaling for routing in routings]
    pairs = zip(outputs, gates, strict=True)
    return [(h * gate.to(h.dtype).unsqueeze(-1)).flatten(2) for h, gate in pairs], probabilities
