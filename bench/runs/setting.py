"""What the runs of an experiment have in common, and the configuration of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from bench.experiments.methods import BASE, method_options
from bench.experiments.profiles import Profile
from bench.models.base import prepare
from bench.records.schema import RunConfig
from tasks import MIXTURES, MixtureData, Source, build


def processes() -> PartialState:
    """This process among those of `accelerate launch`. While the first one scores, the others wait for hours."""
    return PartialState(timeout=timedelta(hours=12))


@dataclass(frozen=True)
class RunSettings:
    """What the runs of an experiment have in common, and where their records go."""

    profile: Profile
    model: str
    source: Source
    mixture: str  # the experiment's name for it; the profile may have a stand-in
    results: Path
    method_options: dict[str, Any] = field(default_factory=dict)  # besides those that `method_options` gives
    max_steps: int | None = None
    max_items: int | None = None
    save: Path | None = None  # a folder for the trained adapter
    peers: dict[str, Path] = field(default_factory=dict)  # adapters whose experts are compared with the run's
    unsafe_code: bool = False  # run what a model writes without a sandbox

    @property
    def mixture_name(self) -> str:
        stand_in = self.profile.mixtures.get(self.mixture, self.mixture)
        return stand_in if isinstance(self.source, type(self.profile.source)) else self.mixture

    @property
    def device(self) -> torch.device:
        return processes().device


def make_run_config(setting: RunSettings, method: str, seed: int, learning_rate: float | None = None) -> RunConfig:
    """The configuration of a run; `learning_rate` None is the paper's."""
    profile = setting.profile
    if method == BASE:
        options, learning_rate, seed = {}, None, 0
    else:
        options = method_options(method, profile, setting.mixture_name, setting.method_options)
        learning_rate = learning_rate or profile.paper_rate
    base = prepare(setting.model)
    data_hash = hashlib.sha256(repr(sorted(load_data(setting, seed).sha256.items())).encode()).hexdigest()
    return RunConfig(
        profile=profile.name,
        model=base.name,
        model_hash=base.hash,
        method=method,
        method_options=options,
        mixture=setting.mixture_name,
        format=profile.format,
        data_hash=data_hash,
        seed=seed,
        learning_rate=learning_rate,
        epochs=profile.epochs,
        batch_size=profile.batch_size,
        warmup_ratio=profile.warmup_ratio,
        weight_decay=profile.weight_decay,
        balance_factor=profile.balance_factor,
        max_grad_norm=profile.max_grad_norm,
        max_length=profile.max_length,
        device_type=setting.device.type,
        max_steps=setting.max_steps,
        max_items=setting.max_items,
    )


def load_data(setting: RunSettings, seed: int) -> MixtureData:
    return _build(setting.mixture_name, setting.source, setting.profile.format, blend_seed(setting, seed))


def blend_seed(setting: RunSettings, seed: int) -> int:
    """The seed of a mixture's draw; one that takes everything is the same for all."""
    return 0 if MIXTURES[setting.mixture_name].blend == "size" else seed


@lru_cache(maxsize=8)
def _build(mixture: str, source: Source, format: str, seed: int) -> MixtureData:
    return build(MIXTURES[mixture], source, format=format, seed=seed)
