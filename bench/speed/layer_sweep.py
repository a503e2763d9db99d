"""The crossover: where a sparse product overtakes a dense one, on one frozen linear map of the backbone's MLP.

Dense work grows with N·r, sparse work with k·r. On a GPU every backend that can be is replayed as a CUDA graph, so that
launches, which a whole backbone's graph hides, cost nobody anything; nothing is compiled, which would take seconds for
every value. It is how `bench.train` runs a layer.
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
from bench.speed.steps import PhaseCallback, Workload
from bench.speed.variants import CONFIGS, DEFAULT_BACKENDS, Variant
from malora.backbone.cuda_graphs import capture
from malora.routing import RoutingLog

SWEEPS: dict[str, tuple[int, ...]] = {
    "experts": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "rank": (4, 8, 16, 32, 64),
    "tokens": (256, 1024, 4096, 16384),
    "top-k": (1, 2, 4, 8),
}


class SingleLayerRow:
    """A method on one frozen linear map: forward, and backward to its input and its factors."""

    def __init__(
        self, variant: Variant, value: int, linear: nn.Linear, options: dict[str, Any], work: Workload
    ) -> None:
        self.variant, self.linear, self.options, self.work, self.batch = variant, linear, options, work, work.batch
        self.layer: malora.MaloraLayer | None = None
        self.about: dict[str, Any] = dataclasses.asdict(variant) | {"value": value}

    @contextmanager
    def session(self) -> Iterator[Step]:
        device = self.linear.weight.device
        if self.layer is None:
            config = CONFIGS[self.variant.method](**self.options)
            self.layer = malora.MaloraLayer(self.linear, "layer", RoutingLog())
            with torch.device("meta"):
                self.layer.update_layer("default", config)
            for parameters in self.layer.children():
                if isinstance(parameters, nn.ParameterDict):
                    for name, value in parameters.items():
                        parameters[name] = nn.Parameter(torch.randn(value.shape, device=device) * 0.02)
            self.layer.set_adapter("default")
            self.about["trainable"] = sum(p.numel() for p in self.layer.parameters() if p.requires_grad)
        torch.cuda.empty_cache()  # the graph of the row before had memory of its own
        x = torch.randn(1, self.work.tokens, self.linear.in_features, device=device, dtype=self.linear.weight.dtype)
        x.requires_grad_()
        gradient = torch.randn(1, self.work.tokens, self.linear.out_features, device=device, dtype=x.dtype)

        def step(end_phase: PhaseCallback) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                y = self.layer(x)
            end_phase("forward")
            y.backward(gradient)
            end_phase("backward")
            self.layer.zero_grad()
            x.grad = None

        if self.variant.run != "captured":
            yield step
            return
        graph = capture(lambda: step(lambda part: None))

        def replay(end_phase: PhaseCallback) -> None:
            graph.replay()
            end_phase("forward_backward")

        yield replay


def sweep_rows(sweep: str, methods: list[str], linear: nn.Linear, work: Workload) -> list[SingleLayerRow]:
    """A row a value of the sweep, method and backend: experts at rank 8, ranks at 8 experts, tokens, or top-k."""
    on_gpu = linear.weight.device.type == "cuda"
    found = []
    for value in SWEEPS[sweep]:
        for method in methods:
            config = CONFIGS[method]()
            options: dict[str, Any] = {"lora_dropout": work.dropout, "r": 8, "num_experts": 8, "top_k": 2}
            if sweep != "tokens":
                options[{"experts": "num_experts", "rank": "r", "top-k": "top_k"}[sweep]] = value
            options["lora_alpha"] = 2 * options["r"]
            if config.d is not None:
                options["d"] = min(linear.in_features, round(config.d / config.r * options["r"]))
            at = dataclasses.replace(work, tokens=value) if sweep == "tokens" else work
            for backend in (*DEFAULT_BACKENDS, "sorted"):
                if backend == "fused" and not on_gpu:
                    continue  # elsewhere it is the dense one
                name, run = f"{method}-{backend}", "eager"
                if on_gpu and malora.BACKENDS[backend].graph_safe:
                    name, run = f"{name}-captured", "captured"
                variant = Variant(name, method, backend, run)
                found.append(SingleLayerRow(variant, value, linear, options | {"backend": backend}, at))
    return found
