"""A call of `python -m bench.speed --loop`: measure training programs, and write the record as they finish."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from bench.errors import UserError
from bench.models.backbone import SHAPES, Shape, backbone
from bench.records import store
from bench.records.provenance import provenance
from bench.records.speed_schema import PeakRates, SpeedOptions, SpeedRecord, SpeedRow
from bench.speed.loops.distributed.ranks import DistributedRow, Ranks, check_world
from bench.speed.loops.external.process import ExternalBaselines, ExternalRow, external_folder
from bench.speed.loops.rounds import LocalRow, Row, measure
from bench.speed.loops.rows import BASES, CHECKPOINTING, LOOPS, LoopRow, select_rows
from bench.speed.profiler import backbone_flops, peak_rates
from bench.speed.rounds import Result
from bench.speed.steps import Workload

Setting = tuple[Shape, int | None, Workload, torch.device]


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Return the loops, modes of checkpointing and bases that were asked for.

    Raises:
        UserError: One of them is unknown, or an option would be ignored.
    """
    return (
        _names("loop", options.loop, LOOPS),
        _names("checkpointing", options.checkpointing or "none", CHECKPOINTING),
        _names("base", options.base or "bf16", BASES),
    )


def _names(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in choices:
            raise UserError(f"--{option} {name} is unknown; there are {', '.join(choices)}.")
    return names


def measure_loops(options: argparse.Namespace, work: Workload, device: torch.device) -> SpeedRecord:
    """Measure the rows that were asked for and return the record, which is in the folder of results.

    It is written anew after each row, so a call that is cut off leaves what it has measured.

    Raises:
        UserError: The options do not fit together.
    """
    asked = chosen(options)
    world = options.world or 1
    found = select_rows(options.variant.split(","), *asked, on_cpu=device.type == "cpu", world=world)
    check_world(world, device)
    folder = external_folder(options.baselines) if any(row.is_external for row in found) else None
    if folder is None:
        found = _without_external(found)
    store.open_folder(options.results)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    journal = _Journal(options, work, device, peak_rates(device, dtype))
    setting = SHAPES[options.shape], options.layers, work, device
    with (
        ExternalBaselines(folder, *setting) if folder else nullcontext() as external,
        Ranks(world, options.shape, options.layers, work, device) as ranks,
    ):
        rows = [_ready(row, setting, external, ranks) for row in found]
        measure(rows, options.rounds, device, journal.save, 60 * (options.minutes or math.inf))
    journal.rates["after"] = PeakRates(**peak_rates(device, dtype))
    return journal.save(journal.rows, journal.rounds)


def _ready(row: LoopRow, setting: Setting, external: ExternalBaselines | None, ranks: Ranks) -> Row:
    """Return a row with the processes that run it."""
    if row.parallel is not None:
        return DistributedRow(row, ranks)
    return ExternalRow(row, external) if external and row.is_external else LocalRow(row, *setting)


def _without_external(rows: list[LoopRow]) -> list[LoopRow]:
    """Leave out the rows that need an environment which is not there, and say so."""
    for row in rows:
        if row.is_external:
            print(f"{row.name}: not measured, because unsloth is not in .baselines; `make baselines`", file=sys.stderr)
    if all(row.is_external for row in rows):
        raise UserError(
            "no row is left to measure; `make baselines` installs what these need, or give --baselines DIR."
        )
    return [row for row in rows if not row.is_external]


class _Journal:
    """The record of a call in the making."""

    def __init__(
        self, options: argparse.Namespace, work: Workload, device: torch.device, rates: dict[str, float]
    ) -> None:
        self.options, self.work = options, work
        self.provenance = provenance(device, jobs=1)
        self.rates: dict[Literal["before", "after"], PeakRates] = {
            "before": PeakRates(**rates),
            "after": PeakRates(**rates),  # until the end
        }
        self.flops = backbone_flops(backbone(SHAPES[options.shape], options.layers, torch.device("meta")), work)
        self.rows: list[Result] = []
        self.rounds = 0
        self.path: Path | None = None

    def save(self, rows: list[Result], rounds: int) -> SpeedRecord:
        """Write the record of some rows in place of the one before."""
        self.rows, self.rounds = rows, rounds
        work = self.work
        record = SpeedRecord(
            shape=self.options.shape,
            mode="loop",
            options=SpeedOptions(
                variant=self.options.variant,
                sweep=None,
                batch=work.batch,
                length=work.length,
                tokens=work.tokens,
                dropout=work.dropout,
                rounds=rounds,
                layers=self.options.layers,
                flops=self.flops,
                world=self.options.world or 1,
            ),
            provenance=self.provenance,
            peak_rates=self.rates,
            rows=[SpeedRow(**row) for row in rows],
        )
        path = store.write_speed(record, self.options.results)
        if self.path is not None and self.path != path:
            self.path.unlink()
        self.path = path
        return record
