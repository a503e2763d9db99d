"""Committed figures of a short run, against which `python -m bench.regress` compares a fresh one.

They are in `results/regressions.json`. Only `python -m bench.regress --update` writes that file.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError

from bench.errors import UserError
from bench.records.files import write_atomically
from bench.records.provenance import ROOT
from bench.records.schema import Provenance
from bench.records.section import Number, Section

PATH = ROOT / "results" / "regressions.json"
# The packages that compute. Another version of one of them may round in another order.
COMPUTING_PACKAGES = ("torch", "transformers", "peft")
CPU_FIELDS = ("model name", "cpu family", "model", "stepping")  # of /proc/cpuinfo; hypervisors shorten the name

Value = Number | str
Bound = Number | None


class Machine(Section):
    """What decides how sums are rounded. Figures of equal machines agree to the digit.

    Attributes:
        processor: Name of the processor, with its family, model and stepping on Linux.
        instructions: Instruction set that torch uses.
        packages: Versions of `COMPUTING_PACKAGES`.
    """

    processor: str
    instructions: str
    packages: dict[str, str | None]


class Figure(Section):
    """A committed figure, and how far a fresh one may be from it.

    A bound of 0 asks for equality. With None the figure is not compared.

    Attributes:
        value: A number or a text.
        same: Bound on an equal `Machine`.
        elsewhere: Bound on other machines with the same base model.
        other_base: Bound on other machines whose base model differs.
        only_above: Whether only larger values are a regression, as of times.
    """

    value: Value
    same: Bound = 0
    elsewhere: Bound = None
    other_base: Bound = None
    only_above: bool = False


class Regressions(Section):
    """The contents of `results/regressions.json`.

    Attributes:
        base_hash: Identity of the base model that the figures were measured on.
        figures: By name. The names begin with the part of `bench.regress` that measures them.
    """

    schema_version: Literal[1] = Field(alias="schema")
    provenance: Provenance
    machine: Machine
    base_hash: str
    figures: dict[str, Figure]


def this_machine(packages: dict[str, str | None]) -> Machine:
    """Describe this machine.

    Args:
        packages: Versions by package, as in a record's provenance.
    """
    return Machine(
        processor=_processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        packages={name: packages[name] for name in COMPUTING_PACKAGES},
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        fields.setdefault(name.strip(), value.strip())
    known = [f"{name} {fields[name]}" for name in CPU_FIELDS[1:] if name in fields]
    return ", ".join([fields.get(CPU_FIELDS[0], platform.machine()), *known])


def read_regressions(path: Path) -> Regressions:
    """Read the committed figures.

    Raises:
        UserError: There is no such file, or it is broken.
    """
    try:
        return Regressions.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; --update measures the figures and writes it.") from error
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not a file of figures ({reason[:200]}); restore it from git, or make it again with --update."
        ) from error


def write_regressions(found: Regressions, path: Path) -> None:
    """Write figures."""
    write_atomically(path, json.dumps(found.to_json(), indent=1) + "\n")


def differences(committed: Machine, here: Machine, packages: Collection[str] = COMPUTING_PACKAGES) -> list[str]:
    """Return what differs between two machines, in words; nothing if they are equal."""
    found = [
        f"{name} {getattr(here, name)} here, {getattr(committed, name)} committed"
        for name in ("processor", "instructions")
        if getattr(here, name) != getattr(committed, name)
    ]
    return found + [
        f"{name} {here.packages[name]} here, {committed.packages.get(name)} committed"
        for name in packages
        if here.packages[name] != committed.packages.get(name)
    ]
