"""What a record holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 2  # in runs of 1 batches were of like length
SPEED_SCHEMA = 1


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's outcome depends on, as far as we choose it. Its hash names the run.

    `learning_rate` is None for the base model, which is scored and not trained. `max_steps` and `max_items` cut a run
    short for trying things out; such a record is not published.
    """

    profile: str
    model: str
    model_hash: str
    method: str
    method_options: dict[str, Any]
    mixture: str
    format: str
    data_hash: str
    seed: int
    learning_rate: float | None
    epochs: int
    batch_size: int
    warmup_ratio: float
    weight_decay: float
    balance_factor: float
    max_grad_norm: float
    max_length: int
    device_type: str
    max_steps: int | None = None
    max_items: int | None = None

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        """A name that a person can read and that no other configuration has."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.mixture.replace('/', '-')}-{self.format}-{self.method}{rate}-s{self.seed}-{self.hash[:8]}"

    def config_key_without(self, *fields: str) -> tuple:
        """The configuration without the named fields: runs that agree in it differ only there."""
        return tuple((k, repr(v)) for k, v in dataclasses.asdict(self).items() if k not in fields)


@dataclass
class Record:
    """What a run gave. Unknown is None.

    Attributes:
        status: ok, diverged (a loss or gradient was not finite), oom or failed.
        parameters: trainable, total, adapter_bytes.
        train: steps, tokens, seconds by part, loss curve, peak bytes, router statistics.
        validation, test: task -> metric, value, stderr, n, version. Rates are chosen on validation alone.
        inside: of a routed adapter: similarity, spectra, movement, routing, as `bench.inside` gives them.
        items: task -> outcomes (1 right, 0 wrong, of ROUGE-L what is between) of the test, in its order; kept in the
            file beside.
    """

    config: RunConfig
    status: str
    provenance: dict[str, Any]
    parameters: dict[str, int] | None = None
    data: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    validation: dict[str, dict[str, Any]] | None = None
    test: dict[str, dict[str, Any]] | None = None
    inside: dict[str, Any] | None = None
    items: dict[str, list[float]] | None = None
    error: str | None = None
    path: Path | None = None

    @property
    def id(self) -> str:
        return self.config.id

    @property
    def complete(self) -> bool:
        """Whether the run was the whole of what it stands for."""
        return self.config.max_steps is None and self.config.max_items is None

    def mean(self, split: str = "test") -> float | None:
        """Mean over tasks of the split's scores, in percent; None without them."""
        scores = getattr(self, split)
        return 100 * sum(s["value"] for s in scores.values()) / len(scores) if scores else None


@dataclass
class SpeedRecord:
    """What one call of `python -m bench.speed` measured. Unknown is None.

    Attributes:
        shape: name of the backbone.
        mode: train, prefill, decode, or layer where one linear map was measured.
        options: what the call was asked for; `layers` cuts the depth for trying things out, and is not published.
        ceilings: before and after: matrix_flops_per_second, copy_bytes_per_second.
        rows: one a variant, in the order of measuring, with every sample.
    """

    shape: str
    mode: str
    options: dict[str, Any]
    provenance: dict[str, Any]
    ceilings: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]

    @property
    def id(self) -> str:
        """Made of when it was measured, for the same call may be made often, and of what it holds."""
        content = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
        when = self.provenance["time"].translate({ord("-"): None, ord(":"): None})
        return f"{self.shape}-{self.mode}-{when}-{content[:8]}"

    @property
    def complete(self) -> bool:
        return self.options["layers"] is None
