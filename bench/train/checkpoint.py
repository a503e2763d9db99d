"""Save and restore the state of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class TrainLog:
    """What training measured, a part before a resume included.

    Seconds are by part: data, forward, backward, optimizer; forward and backward are one
    part, forward_backward, where a step is one CUDA graph.
    """

    steps: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)  # step, loss, balance_loss, grad_norm: means since last
    router: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None  # of the GPU's memory


class _Checkpoint:
    """All that decides how a run goes on. Whole or not there; read by the same configuration and code only."""

    def __init__(self, path: Path, identity: str, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        self.path, self.identity = path, identity
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer, self.scheduler = optimizer, scheduler

    def save(self, log: TrainLog) -> None:
        state = {
            "identity": self.identity,
            "log": vars(log),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def load(self) -> TrainLog | None:
        """Restore the state and return its log; None where there is nothing to go on from."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        if state["identity"] != self.identity:
            return None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return TrainLog(**state["log"])
