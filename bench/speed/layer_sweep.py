"""Sweeps of the experts, rank, tokens or top-k of one adapted linear layer.

They find where sparse backends overtake dense ones.

Dense work grows with N·r, sparse work with k·r (N experts, r rank, k experts per token). On a GPU every backend that
can be captured is replayed as a CUDA graph, as `bench` trains a layer. So launch overhead, which the graph of a whole
model hides too, counts for none of them. Nothing is compiled: compilation would take seconds per value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import malora
from bench.speed.rounds import Step
from bench.speed.steps import PhaseCallback, Workload, ignore_phase
from bench.speed.variants import CONFIGS, DEFAULT_BACKENDS, Variant, our_config
from malora.backbone.cuda_graphs import capture
from malora.routing import RoutingLog

SWEEPS: dict[str, tuple[int, ...]] = {
    "experts": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "rank": (4, 8, 16, 32, 64),
    "tokens": (256, 1024, 4096, 16384),
    "top-k": (1, 2, 4, 8),
}
SWEPT_OPTIONS = {"experts": "num_experts", "rank": "r", "top-k": "top_k"}  # of the config; tokens are the workload's
RANK, EXPERTS, TOP_K = 8, 8, 2  # of what is not swept: the paper's MoLoRA


class SingleLayerRow:
    """A method on one frozen linear layer, forward and backward.

    The backward pass goes to the input and the adapter's weights.
    """

    def __init__(
        self, variant: Variant, value: int, linear: nn.Linear, options: dict[str, Any], work: Workload
    ) -> None:
        self.variant, self.linear, self.options, self.work, self.batch = variant, linear, options, work, work.batch
        self.layer: malora.MaloraLayer | None = None
        self.about: dict[str, Any] = dataclasses.asdict(variant) | {"value": value}

    @contextmanager
    def session(self) -> Iterator[Step]:
        """Build the layer the first time, and capture its step if the variant is captured."""
        if self.layer is None:
            assert self.variant.method is not None, "only adapted layers are swept"
            config = CONFIGS[self.variant.method](**self.options)  # may raise, which becomes the row's status
            assert isinstance(config, malora.MaloraConfig), "sweeps take mixtures of ours"
            self.layer = _adapted_layer(self.linear, config)
            self.about["trainable"] = sum(p.numel() for p in self.layer.parameters() if p.requires_grad)
        torch.cuda.empty_cache()  # the previous row's graph had a memory pool of its own
        step = _layer_step(self.layer, self.linear, self.work.tokens)
        if self.variant.run != "captured":
            yield step
            return
        graph = capture(lambda: step(ignore_phase))

        def replay(end_phase: PhaseCallback) -> None:
            graph.replay()
            end_phase("forward_backward")

        yield replay


def _adapted_layer(linear: nn.Linear, config: malora.MaloraConfig) -> malora.MaloraLayer:
    """Put an adapter with random weights on a linear layer."""
    device = linear.weight.device
    layer = malora.MaloraLayer(linear, "layer", RoutingLog())
    with torch.device("meta"):
        layer.update_layer("default", config)
    for parameters in layer.children():
        if isinstance(parameters, nn.ParameterDict):
            for name, parameter in parameters.items():
                parameters[name] = nn.Parameter(torch.randn(parameter.shape, device=device) * 0.02)
    layer.set_adapter("default")
    return layer


def _layer_step(layer: malora.MaloraLayer, linear: nn.Linear, tokens: int) -> Step:
    """Return a step of the layer on random inputs and output gradients."""
    device, dtype = linear.weight.device, linear.weight.dtype
    x = torch.randn(1, tokens, linear.in_features, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(1, tokens, linear.out_features, device=device, dtype=dtype)

    def step(end_phase: PhaseCallback) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            y = layer(x)
        end_phase("forward")
        y.backward(dy)
        end_phase("backward")
        layer.zero_grad()
        x.grad = None

    return step


def sweep_rows(sweep: str, methods: list[str], linear: nn.Linear, work: Workload) -> list[SingleLayerRow]:
    """Return a row per value of the sweep, method and backend.

    What is not swept has rank 8, 8 experts, top-2 routing and the tokens of `work`. The rank of a shared subspace grows
    with the rank, up to the width of the layer's input.
    """
    on_gpu = linear.weight.device.type == "cuda"
    backends = [name for name in (*DEFAULT_BACKENDS, "sorted") if on_gpu or name != "fused"]  # on a CPU it is "dense"
    found = []
    for value in SWEEPS[sweep]:
        value_work = dataclasses.replace(work, tokens=value) if sweep == "tokens" else work
        for method in methods:
            options = _sweep_options(sweep, value, method, linear.in_features) | {"lora_dropout": work.dropout}
            for backend in backends:
                variant = _layer_variant(method, backend, on_gpu)
                found.append(SingleLayerRow(variant, value, linear, options | {"backend": backend}, value_work))
    return found


def _sweep_options(sweep: str, value: int, method: str, in_features: int) -> dict[str, Any]:
    """Return the config's options at one value of a sweep."""
    default = our_config(method)
    options: dict[str, Any] = {"r": RANK, "num_experts": EXPERTS, "top_k": TOP_K}
    if sweep in SWEPT_OPTIONS:
        options[SWEPT_OPTIONS[sweep]] = value
    options["lora_alpha"] = 2 * options["r"]
    if default.d is not None:
        options["d"] = min(in_features, round(default.d / default.r * options["r"]))
    return options


def _layer_variant(method: str, backend: str, on_gpu: bool) -> Variant:
    captured = on_gpu and malora.BACKENDS[backend].graph_safe
    name = f"{method}-{backend}"
    return Variant(f"{name}-captured", method, backend, "captured") if captured else Variant(name, method, backend)
