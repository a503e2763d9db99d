"""Typed contents of a speed record: one call of `python -m bench.speed`."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Literal

from pydantic import AliasChoices, Field, field_validator

from bench.records.schema import Provenance
from bench.records.section import Integer, Number, Section

SPEED_SCHEMA = 1
CUT_SHAPES = ("llama3-70b",)  # more than one GPU holds: a record of training programs says how many layers it had


class PeakRates(Section):
    """Highest rates measured on a device by a large matmul and a large copy."""

    matrix_flops_per_second: Number = Field(gt=0)
    copy_bytes_per_second: Number = Field(gt=0)


class SpeedOptions(Section):
    """The workload of a speed measurement.

    Attributes:
        variant: The variants that were asked for.
        sweep: The size that varies in a single-layer sweep; None for a whole backbone.
        batch: Sequences per micro-batch.
        length: Tokens per sequence.
        tokens: Tokens per training step, or generated tokens in decode.
        layers: Shortened depth of a trial measurement, which is not published; else None.
        flops: Matrix operations of the frozen backbone per step; None where they were not counted.
        world: Number of GPUs, in records of whole training programs. See the rows for those that use all of them.
    """

    variant: str
    sweep: str | None
    batch: Integer
    length: Integer
    tokens: Integer
    dropout: Number
    rounds: Integer
    layers: Integer | None
    flops: Integer | None
    world: Integer | None = None


class PeakBytes(Section):
    """Peak GPU memory in bytes."""

    allocated: Number
    reserved: Number


class SpeedRow(Section):
    """One variant's measurement. The order of the fields is that of the stored keys.

    Attributes:
        reason: The error of a variant that did not run, or a remark.
        seconds: Samples by phase; "step" is their sum.
        sensors: Medians per round: clock_mhz, watts, celsius; unset in older records.
        kernels: Kernels per step; None on a CPU, as are launches, synchronisations and where.
        where: The longest kernels as (name, calls, seconds).
        value: The swept size, in a single-layer sweep.
        loop: How the training loop runs, in records of whole training programs; so are the fields that follow.
        checkpointing: What is kept for the backward pass: none (everything), full, offload or lean.
        base: Precision of the frozen weights: bf16, nf4, int8 or fp8.
        dropout: Dropout of the adapter, if it is another than that of the record's options.
        loss: Loss of the last micro-batch, to see that the rows train the same model; None if it was not finite.
        package: Name and version of the package that trained in an environment of its own, or that quantized the base.
        parallel: How several GPUs train one model: "ddp" or "fsdp"; None on one GPU.
        world: Number of those GPUs. Each has the tokens of the record's options, so the row's step has `world` times
            as many. Seconds are those of the slowest process, and peak memory is the largest of them.
    """

    status: Literal["ok", "oom", "failed", "unavailable"]
    reason: str | None = None
    seconds: dict[str, list[Number]] = Field(default_factory=dict)
    sensors: dict[str, list[Number]] = Field(default_factory=dict)
    peak_bytes: PeakBytes | None = None
    first_seconds: Number | None = None
    warm_seconds: Number | None = None
    kernels: Integer | None = None
    launches: Integer | None = None
    synchronisations: Integer | None = None
    where: list[tuple[str, Integer, Number]] | None = None
    build_seconds: Number | None = None
    name: str
    method: str | None = None
    backend: str | None = None
    run: str | None = None
    plain: bool | None = None
    liger: bool | None = None
    value: Integer | None = None
    trainable: Integer | None = None
    autocast: bool | None = None
    batch: Integer | None = None
    loop: Literal["plain", "compiled", "captured"] | None = None
    checkpointing: str | None = None
    base: str | None = None
    dropout: Number | None = None
    loss: Number | None = None
    package: str | None = None
    parallel: Literal["ddp", "fsdp"] | None = None
    world: int | None = None

    @field_validator("loss", mode="before")
    @classmethod
    def _finite(cls, value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value


class SpeedRecord(Section):
    """One call of `python -m bench.speed`.

    Attributes:
        shape: Name of the backbone.
        mode: train, prefill, decode; layer for a single linear layer; loop for whole training programs.
        peak_rates: Before and after the measurement; stored as `ceilings`.
        rows: One per variant, in the order of measuring.
    """

    shape: str
    mode: Literal["train", "prefill", "decode", "layer", "loop"]
    options: SpeedOptions
    provenance: Provenance
    peak_rates: dict[Literal["before", "after"], PeakRates] = Field(
        validation_alias=AliasChoices("peak_rates", "ceilings"), serialization_alias="ceilings"
    )
    rows: list[SpeedRow]

    @field_validator("peak_rates")
    @classmethod
    def _has_both(cls, value: dict[str, PeakRates]) -> dict[str, PeakRates]:
        if len(value) < 2:
            raise ValueError("the rates before and after the measurement are needed")
        return value

    @property
    def id(self) -> str:
        """A name from the time and the content: the same call may be made often."""
        content = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        when = self.provenance.time.translate({ord("-"): None, ord(":"): None})
        return f"{self.shape}-{self.mode}-{when}-{content[:8]}"

    @property
    def complete(self) -> bool:
        """True if the backbone had its full depth, or as many layers as one GPU holds."""
        return self.options.layers is None or (self.mode == "loop" and self.shape in CUT_SHAPES)
