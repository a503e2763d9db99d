"""Settings that an experiment's runs share, and the configuration of each run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bench.evaluate.score import metric_of
from bench.experiments.methods import BASE, method_options
from bench.experiments.profiles import Profile
from bench.models.base import prepare
from bench.records.schema import RunConfig
from bench.records.scorer_versions import named_versions
from bench.runtime.processes import processes
from tasks import MIXTURES, MixtureData, Source, build


@dataclass(frozen=True)
class RunSettings:
    """Settings that the runs of an experiment share.

    Attributes:
        profile: Size of the experiment.
        model: A built-in name, a folder, or an id on the Hugging Face hub.
        source: Source of the data.
        mixture: The experiment's name for its mixture; the profile may have a substitute, see `mixture_name`.
        results: Folder of the records.
        method_options: Options on top of those that `bench.experiments.methods.method_options` chooses.
        max_steps: Stop training after this many steps.
        max_items: Score only this many items per task.
        save: Folder for the trained adapter.
        peers: Folders of adapters to compare the run's experts with, by the name of the comparison.
        unsafe_code: Run generated programs without a sandbox.
        track: Trackers to log losses and scores to, names in `bench.train.tracking.TRACKERS`.
    """

    profile: Profile
    model: str
    source: Source
    mixture: str
    results: Path
    method_options: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    max_items: int | None = None
    save: Path | None = None
    peers: dict[str, Path] = field(default_factory=dict)
    unsafe_code: bool = False
    track: tuple[str, ...] = ()

    @property
    def mixture_name(self) -> str:
        """The mixture to train on.

        It is the profile's substitute, if the data come from the profile's source.
        """
        substitute = self.profile.mixtures.get(self.mixture, self.mixture)
        return substitute if isinstance(self.source, type(self.profile.source)) else self.mixture

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = processes().device
        return device


def make_run_config(setting: RunSettings, method: str, seed: int, learning_rate: float | None = None) -> RunConfig:
    """Make the configuration of a run.

    Args:
        setting: What the runs have in common.
        method: A name in METHODS, or BASE. The base has neither options nor seed nor learning rate.
        seed: Seed of initialisation, order of the examples and dropout.
        learning_rate: Learning rate; None for the paper's.

    Raises:
        UserError: The method, the model or the data do not allow this run.
    """
    profile = setting.profile
    options: dict[str, Any] = {}
    if method == BASE:
        learning_rate, seed = None, 0
    else:
        options = method_options(method, profile, setting.mixture_name, setting.method_options)
        learning_rate = learning_rate or profile.paper_rate
    base = prepare(setting.model)
    mixture = MIXTURES[setting.mixture_name]
    data_hash = hashlib.sha256(repr(sorted(load_data(setting, seed).sha256.items())).encode()).hexdigest()
    return RunConfig(
        profile=profile.name,
        model=base.name,
        model_hash=base.hash,
        method=method,
        method_options=options,
        mixture=mixture.name,
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
        scorer_versions=named_versions(
            {task: metric_of(task, profile.format, mixture.compares_summed) for task in mixture.tasks}
        ),
    )


def load_data(setting: RunSettings, seed: int) -> MixtureData:
    """Read and format the mixture's examples; the last few mixtures are cached.

    Raises:
        UserError: A file is missing or broken.
    """
    build_cached: Callable[..., MixtureData] = _build  # a source is hashable, but its protocol does not say so
    return build_cached(setting.mixture_name, setting.source, setting.profile.format, blend_seed(setting, seed))


def blend_seed(setting: RunSettings, seed: int) -> int:
    """Return the seed of the draw of examples.

    It is 0 for a mixture that takes all examples, else the run's.
    """
    return 0 if MIXTURES[setting.mixture_name].blend == "size" else seed


@lru_cache(maxsize=8)
def _build(mixture: str, source: Source, format: str, seed: int) -> MixtureData:
    return build(MIXTURES[mixture], source, format=format, seed=seed)
