"""Typed contents of a run's record: its configuration and its sections.

Every section is validated when it is made or
read. Unknown is None. A field that an older record lacks stays unset, and is not written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, field_validator

from bench.records.section import Integer as Integer
from bench.records.section import Model, Section
from bench.records.section import Number as Number
from bench.records.task_scores import GoldAnswers as GoldAnswers
from bench.records.task_scores import TaskScore as TaskScore

SCHEMA = 2  # schema 1 grouped examples of similar length into a batch

Split = Literal["validation", "test"]
Projection = Literal["A", "B"]


class RunConfig(Section):
    """Every setting that a run's outcome depends on. Its hash names the run.

    Attributes:
        model_hash: Identity of the base model; see `bench.models.base.BaseModel`.
        learning_rate: None for the base model, which is scored but not trained.
        max_steps: Shortens a trial run; such a record is not published.
        max_items: Shortens a trial run's scoring; such a record is not published.
        scorer_versions: Version of the scorer by task, where it is later than 2; see `bench.records.scorer_versions`.
            None if there are no such tasks, as in all records before version 3.
    """

    profile: str
    model: str
    model_hash: str
    method: str
    method_options: dict[str, Any]
    mixture: str
    format: str
    data_hash: str
    seed: Integer
    learning_rate: Number | None
    epochs: Integer
    batch_size: Integer
    warmup_ratio: Number
    weight_decay: Number
    balance_factor: Number
    max_grad_norm: Number
    max_length: Integer
    device_type: str
    max_steps: Integer | None = None
    max_items: Integer | None = None
    scorer_versions: dict[str, Integer] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all fields: the hash covers the defaults too.

        Only `scorer_versions` is left out if it is None, so that runs without a change keep their hashes.
        """
        fields = self.model_dump()
        return fields if self.scorer_versions else {k: v for k, v in fields.items() if k != "scorer_versions"}

    @property
    def hash(self) -> str:
        """Hex sha256 of the configuration as sorted JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        """A readable name that no other configuration has."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.mixture.replace('/', '-')}-{self.format}-{self.method}{rate}-s{self.seed}-{self.hash[:8]}"

    def config_key_without(self, *fields: str) -> tuple[tuple[str, str], ...]:
        """Return the configuration without the named fields.

        It serves to find runs that differ only in those.
        """
        return tuple((name, repr(value)) for name, value in self if name not in fields)


class Provenance(Section):
    """The code, packages and machine that made a record.

    Attributes:
        time: UTC, as 2026-01-31T12:00:00Z.
        commit: None without a git history.
        dirty: Whether the sources differed from the commit.
        source_sha256: Hash of the Python sources.
        packages: Version by package name; None if it is not installed.
        device: Name of the GPU or CPU.
        concurrent_runs: Runs that shared the machine; with more than one, seconds are not comparable.
        trained_together: Runs that trained in the same forward passes, this one included; None if it trained alone. The
            seconds of its training are those of all, and its peak memory is unknown.
    """

    time: str
    commit: str | None
    dirty: bool | None
    source_sha256: str
    python: str
    packages: dict[str, str | None]
    device: str
    cuda: str | None
    driver: str | None
    concurrent_runs: Integer
    trained_together: Integer | None = None


class Parameters(Section):
    """Numbers of parameters, and the size of the saved adapter in bytes."""

    trainable: Integer
    total: Integer
    adapter_bytes: Integer


class TaskData(Section):
    """The training data of one task in one epoch.

    Attributes:
        largest_class: Share of the examples that are of the largest class; None for a task without classes, and in
            older records.
    """

    examples: Integer
    tokens: Integer
    label_tokens: Integer
    largest_class: Number | None = None


class DataSection(Section):
    """The data of a run.

    Attributes:
        sha256: Hash by split: train, validation, test.
        dropped: By task, training examples left out because an evaluation set has them.
        dropped_validation: By task, validation examples left out because the test set has them; None in older records.
        train: By task; None for the base model.
    """

    sha256: dict[str, str]
    dropped: dict[str, Integer]
    dropped_validation: dict[str, Integer] | None = None
    train: dict[str, TaskData] | None = None

    @field_validator("sha256")
    @classmethod
    def _has_test(cls, value: dict[str, str]) -> dict[str, str]:
        if "test" not in value:
            raise ValueError("there is no hash of the split test, by which tables compare records")
        return value


class CurvePoint(Section):
    """Means over the last ten steps of the training loop.

    They are None where they were not finite.
    """

    step: Integer
    loss: Number | None
    balance_loss: Number | None
    grad_norm: Number | None


class RouterPoint(Section):
    """Router statistics at one step, as means over layers.

    Attributes:
        entropy: Of the gates before top-k, in nats.
        gate_sum: Sum of the selected gates.
        largest_share: Share of assignments of the most used expert.
        unused_experts: Experts without a token in this batch, over all layers.
    """

    step: Integer
    entropy: Number | None
    gate_sum: Number | None
    largest_share: Number | None
    unused_experts: Integer


class TrainSection(Section):
    """The training of a run.

    Attributes:
        seconds: By phase: data, forward_backward (in earlier records forward, backward), optimizer, evaluation.
        peak_bytes: Peak GPU memory; None on a CPU.
        steady_step_seconds: Median of the mean seconds of ten steps, which compilation and capture do not change; None
            in older records and of runs that trained together.
        captures: CUDA graphs captured, one per shape of a micro-batch; None if there were none, and in older records.
    """

    steps: Integer
    tokens: Integer
    seconds: dict[str, Number]
    curve: list[CurvePoint]
    router: list[RouterPoint]
    peak_bytes: Integer | None
    steady_step_seconds: Number | None = None
    captures: Integer | None = None

    @property
    def training_seconds(self) -> float:
        """The time of all phases but evaluation."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "evaluation")


# By projection, the mean over expert pairs and the chance level.
Similarity = dict[Projection, tuple[Number, Number] | None]


class Spectrum(Section):
    """Singular values of a module's stacked experts, descending; means over modules."""

    values: list[Number]
    stable_rank: Number | None
    effective_rank: Number | None


class Movement(Section):
    """Distance of the down projection from its start.

    Attributes:
        factor: S, or A for a method without a shared subspace.
        relative: By layer, ||now - start|| / ||start||.
        angle: Mean principal angle in degrees.
    """

    factor: Literal["S", "A"]
    relative: list[Number | None]
    angle: Number


class Routing(Section):
    """Routing of validation prompts, by decoder layer.

    Attributes:
        entropy: By task, in nats.
        largest_share: By task, the most used expert's share of assignments.
        unused: By task, the number of experts without a token.
        load: [layers, N] shares of assignments in descending order.
        task_information: Mutual information of task and expert in nats.
    """

    entropy: dict[str, list[Number | None]]
    largest_share: dict[str, list[Number | None]]
    unused: dict[str, list[Number | None]]
    load: list[list[Number]]
    task_information: list[Number | None]


class InsideSection(Section):
    """Analysis of a trained adapter with a router.

    See `bench.evaluate.adapter_analysis`.

    Attributes:
        similarity: By compared experts (within, start, ST(S), ST(D)) and statistic (mean, mean_square).
        spectra: By projection.
    """

    similarity: dict[str, dict[str, Similarity]]
    spectra: dict[Projection, Spectrum]
    movement: Movement
    routing: Routing


Status = Literal["ok", "diverged", "oom", "failed"]


class RunSections(Model):
    """The sections of a run's record as its file has them.

    Attributes:
        status: ok, diverged (a loss or gradient was not finite), oom (out of memory) or failed.
        validation: Scores by task. Learning rates are chosen on these alone.
        test: Scores by task.
        inside: Analysis of the trained adapter; None without a router.
        error: Message of a run that is not ok.
    """

    model_config = ConfigDict(validate_assignment=True)

    config: RunConfig
    status: Status
    provenance: Provenance
    parameters: Parameters | None = None
    data: DataSection | None = None
    train: TrainSection | None = None
    validation: dict[str, TaskScore] | None = None
    test: dict[str, TaskScore] | None = None
    inside: InsideSection | None = None
    error: str | None = None


class Record(RunSections):
    """A run's record.

    Attributes:
        items: By task, the outcome of every test item in order: 1 right, 0 wrong, in between for some metrics. They are
            stored in a file of their own.
        gold: By task, losses and classes of the correct answers, in the same file; None in older records.
        path: File that the record was read from or written to.
    """

    items: dict[str, list[Number]] | None = None
    gold: dict[str, GoldAnswers] | None = None
    path: Path | None = None

    @property
    def id(self) -> str:
        """The id of the configuration."""
        return self.config.id

    @property
    def complete(self) -> bool:
        """True if the run was not shortened by max_steps or max_items."""
        return self.config.max_steps is None and self.config.max_items is None

    def mean(self, split: Split = "test") -> float | None:
        """Return the mean over tasks of a split's scores in percent.

        It is None without scores.
        """
        scores = self.test if split == "test" else self.validation
        return 100 * sum(score.value for score in scores.values()) / len(scores) if scores else None

    def validation_loss(self, without: Collection[str] = ()) -> float:
        """Return the mean over tasks of the validation loss in nats per label token.

        It is infinite for a run that did not end well, and for a record without losses.

        Args:
            without: Tasks that do not count.
        """
        losses = [score.loss for task, score in (self.validation or {}).items() if task not in without]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if self.status == "ok" and known and len(known) == len(losses) else math.inf
