"""The rows of a measurement of whole training programs: a method, its loop, its checkpointing and its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from bench.errors import UserError, unknown_name
from bench.models.quantized import QUANTIZED
from bench.speed.baselines import has_liger
from bench.speed.loops import distributed_programs, programs
from bench.speed.loops.programs import Batches
from bench.speed.variants import CONFIGS
from malora.backbone.checkpointing_modes import MODES

LOOPS = ("plain", "compiled", "captured")
CHECKPOINTING = MODES
BASES = ("bf16", *QUANTIZED, "fp8")
UNSLOTH = "unsloth-lora"
METHODS = ("malora", "molora", "lora")  # ours


@dataclass(frozen=True)
class LoopRow:
    """A training program, and what it trains.

    Attributes:
        name: Name in records and tables.
        method: Name in `bench.speed.variants.CONFIGS`; None for the frozen backbone alone.
        loop: "plain", "compiled" (each decoder layer) or "captured" (as CUDA graphs).
        checkpointing: A mode of `malora.set_checkpointing`; for others, "none", or "full" for their own.
        base: Precision of the frozen weights: "bf16", "nf4", "int8", or "fp8" by our fp8 backend.
        liger: Whether Liger's kernels are used, out of the box.
        dropout: Dropout of the adapter, if it is another than that of the call.
        parallel: How several GPUs train one model: "ddp" (each has the whole model) or "fsdp" (each has a share of all
            weights); None on one GPU.
    """

    name: str
    method: str | None
    loop: str = "plain"
    checkpointing: str = "none"
    base: str = "bf16"
    liger: bool = False
    dropout: float | None = None
    parallel: str | None = None

    @property
    def is_external(self) -> bool:
        """True if another package trains it, in a worker process."""
        return self.method == UNSLOTH

    @property
    def is_ours(self) -> bool:
        """True if malora computes the row."""
        return self.method in METHODS

    @property
    def backend(self) -> str | None:
        """The backend of malora; None for others."""
        if not self.is_ours:
            return None
        return "fp8" if self.base == "fp8" else "auto"

    @property
    def weights(self) -> str:
        """The frozen weights that the program gets. Our fp8 backend quantizes those of a bfloat16 base."""
        return "bf16" if self.base == "fp8" else self.base

    @property
    def about(self) -> dict[str, Any]:
        """Fields of the row in a record."""
        return dataclasses.asdict(self) | {"backend": self.backend}

    def program(self, base: PreTrainedModel, batches: Batches, dropout: float) -> Generator[Tensor]:
        """Return the program, which yields the loss after each optimizer step."""
        assert not self.is_external, "it runs in a worker"
        compiled = self.loop == "compiled"
        if self.method is None:
            return programs.floor(base, batches, compiled, self.checkpointing != "none")
        config = CONFIGS[self.method](
            lora_dropout=dropout, **({"backend": self.backend} if self.backend is not None else {})
        )
        if self.parallel is not None:
            return self._distributed(base, config, batches)
        if self.is_ours and self.loop == "captured":
            return programs.malora_captured(base, config, batches, self.checkpointing)
        if self.is_ours:
            return programs.malora_plain(base, config, batches, self.checkpointing, compiled)
        if self.base in QUANTIZED:
            return programs.peft_quantized(base, config, batches)
        if self.loop == "captured":
            return programs.peft_captured(base, config, batches)
        if self.liger and not has_liger():
            raise UserError("liger_kernel is not installed")
        if self.liger:
            return programs.peft_liger(base, config, batches)
        if self.checkpointing != "none":
            return programs.peft_checkpointed(base, config, batches)
        return programs.peft(base, config, batches, compiled)

    def _distributed(self, base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
        """Return the program of one of several connected processes."""
        compiled = self.loop == "compiled"
        if self.parallel == "fsdp":
            if self.is_ours:
                return distributed_programs.malora_fsdp(base, config, batches, self.checkpointing, compiled)
            return distributed_programs.peft_fsdp(base, config, batches)
        if not self.is_ours:
            return distributed_programs.peft_ddp(base, config, batches)
        if self.loop == "captured":
            return distributed_programs.malora_captured_ddp(base, config, batches, self.checkpointing)
        return distributed_programs.malora_ddp(base, config, batches, self.checkpointing, compiled)


BASELINES = (
    LoopRow("floor", None),
    LoopRow("floor-compiled", None, "compiled"),
    LoopRow("peft-lora", "peft-lora"),
    LoopRow("peft-lora-liger", "peft-lora", liger=True),
    LoopRow("peft-lora-compiled", "peft-lora", "compiled"),
    LoopRow("peft-lora-captured", "peft-lora", "captured"),
    LoopRow("peft-lora-ddp", "peft-lora", parallel="ddp"),
    LoopRow("peft-lora-fsdp", "peft-lora", parallel="fsdp"),
    LoopRow("floor-full", None, checkpointing="full"),
    LoopRow("peft-lora-full", "peft-lora", checkpointing="full"),
    LoopRow("peft-lora-nf4-full", "peft-lora", checkpointing="full", base="nf4"),
    LoopRow("peft-lora-int8-full", "peft-lora", checkpointing="full", base="int8"),
    LoopRow(UNSLOTH, UNSLOTH),
    LoopRow(f"{UNSLOTH}-no-dropout", UNSLOTH, dropout=0.0),
    LoopRow(f"{UNSLOTH}-full", UNSLOTH, checkpointing="full"),
    LoopRow(f"{UNSLOTH}-full-no-dropout", UNSLOTH, checkpointing="full", dropout=0.0),
    LoopRow(f"{UNSLOTH}-nf4-full", UNSLOTH, checkpointing="full", base="nf4"),
)


def all_rows() -> dict[str, LoopRow]:
    """Return all rows by name: the baselines, then ours."""
    found = list(BASELINES)
    for method in METHODS:
        for base in BASES:
            for checkpointing in CHECKPOINTING:
                for loop in _loops(checkpointing):
                    found += [
                        _our_row(method, base, checkpointing, loop, parallel) for parallel in _parallel(base, loop)
                    ]
    return {row.name: row for row in found}


def _loops(checkpointing: str) -> tuple[str, ...]:
    """Return the loops that a mode of checkpointing is measured in. The compiler has its own rules of what to keep."""
    return LOOPS if checkpointing == "none" else ("plain", "captured")


def _parallel(base: str, loop: str) -> tuple[str | None, ...]:
    """Return how a kind of row is measured on several GPUs, and None for one GPU.

    FSDP2 gathers weights in hooks, which no CUDA graph has.
    """
    if base != "bf16":
        return (None,)
    return (None, "ddp") if loop == "captured" else (None, "ddp", "fsdp")


def _our_row(method: str, base: str, checkpointing: str, loop: str, parallel: str | None) -> LoopRow:
    words = [word for word, default in ((base, "bf16"), (checkpointing, "none")) if word != default]
    name = "-".join(filter(None, [method, *words, loop, parallel]))
    return LoopRow(name, method, loop, checkpointing, base, parallel=parallel)


def select_rows(
    names: Sequence[str],
    loops: Sequence[str],
    checkpointing: Sequence[str],
    bases: Sequence[str],
    on_cpu: bool,
    world: int = 1,
) -> list[LoopRow]:
    """Return the rows that a user asked for.

    A name is a method, or one row. A method selects its rows with one of these loops, modes and bases, and the
    baselines with these bases, with and without checkpointing as the modes are. On a CPU it selects no baseline that
    takes compilation or Triton: compiling takes longer than the measurement. A captured row runs there as a plain one.
    If `world` is above 1, it also selects rows that several GPUs train.

    Raises:
        UserError: A name is neither, no row of a method is as asked for, or the number of GPUs does not fit the rows.
    """
    known = all_rows()
    chosen: list[LoopRow] = []
    for name in names:
        if name in known:
            chosen.append(known[name])
        elif name in METHODS:
            found = [
                row
                for row in known.values()
                if (row.method == name and row.loop in loops and row.checkpointing in checkpointing)
                and (row.base in bases and (world > 1 or row.parallel is None))
            ]
            if not found:
                raise UserError(
                    f"{name} has no row with --loop {','.join(loops)} and --checkpointing {','.join(checkpointing)}: "
                    "a compiled loop is measured without checkpointing; leave one of them out."
                )
            saves = {mode != "none" for mode in checkpointing}
            chosen += [
                row
                for row in BASELINES
                if (row.base in bases and (row.checkpointing != "none") in saves)
                and (world > 1 or row.parallel is None)
                and not (on_cpu and (row.liger or row.loop != "plain"))
            ]
            chosen += found
        else:
            raise UserError(f"{unknown_name('variant', name, [*METHODS, *known])}.")
    chosen = list(dict.fromkeys(chosen))
    distributed = [row.name for row in chosen if row.parallel is not None]
    if distributed and world == 1:
        raise UserError(f"{distributed[0]} trains on several GPUs; add --world 2, or more.")
    if world > 1 and not distributed:
        raise UserError(
            f"--world {world} has no effect: no row that was asked for trains on several GPUs. Ask for one with "
            "--base bf16, such as malora-plain-ddp, or leave --world out."
        )
    return chosen
