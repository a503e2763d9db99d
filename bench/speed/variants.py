"""What the profiler compares: backbones of random weights, and the variants of adapter that are put on them.

A variant is a row: an adapter, how it is computed, and how it is run. "eager" is the model as it comes, "compiled" has
its decoder layers and its loss compiled by torch.compile, "captured" is compiled and replayed as a CUDA graph besides.
With Liger's kernels no layer is compiled: they stand where the compiler's would.

Precision. The backbone is bfloat16 on a GPU. PEFT keeps its adapters in float32 on such a base unless told otherwise,
and so do ours: they train under bfloat16 autocast, as with the Trainer's `bf16=True`. A `plain` variant has its adapter
in bfloat16 and needs no autocast. For inference a PEFT row as it comes has what `get_peft_model` gave, float32 adapters
without autocast; every other row is cast to bfloat16, which a user can do in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftConfig

import malora
from bench.errors import UserError


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        method: a name in CONFIGS; None for the frozen backbone alone, the floor.
        backend: for methods of ours, one of `malora.BACKENDS`, or the rival of `bench.rivals`.
        run: eager, compiled or captured.
        plain: the adapter is in bfloat16 and trains without autocast.
        liger: the kernels of `bench.liger` around it; in rows that are not ours Liger as it comes, with its loss.
    """

    name: str
    method: str | None = None
    backend: str | None = None
    run: str = "eager"
    plain: bool = False
    liger: bool = False

    @property
    def needs_gpu(self) -> bool:
        return self.run == "captured" or self.backend in ("fused", "fp8") or self.liger

    @property
    def out_of_the_box(self) -> bool:
        return self.method is not None and self.backend is None and self.run == "eager" and not self.plain


# LoRA of PEFT, the same through our layer with one expert, and the paper's others.
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "peft-lora": malora.METHODS["lora"],
    "peft-dora": malora.METHODS["dora"],
    "lora": partial(malora.METHODS["asylora"], r=64, lora_alpha=128, freeze=[]),
    **{
        name: partial(malora.make_config, name) for name in ("asylora", "molora", "moasylora", "malora", "malora-small")
    },
}
OURS = tuple(name for name in CONFIGS if not name.startswith("peft-"))
ROUTED = tuple(name for name in OURS if CONFIGS[name]().has_router)
# Without the oracle, what is not exact, and `sorted`, which few have rows of. "auto" is one of the others.
DEFAULT_BACKENDS = tuple(
    name for name, backend in malora.BACKENDS.items() if backend.exact and name not in ("auto", "reference", "sorted")
)
MAIN = ("lora", "molora", "malora")  # they run in every way; the others in that which trains them fastest, and plainly
RUNS = ("eager", "compiled", "captured")
# With them a method's row can be read: they are measured whenever a method is asked for by its name.
BASELINES = ("floor", "floor-compiled", "floor-captured", "peft-lora", "peft-lora-compiled", "peft-lora-captured",
             "lora-plain-compiled")  # fmt: skip


def variants() -> dict[str, Variant]:
    """Every row that there is, in the order of the table."""
    rows = [Variant(_name("floor", run), run=run) for run in RUNS]
    rows += [Variant(_name("peft-lora", run), "peft-lora", run=run) for run in RUNS]
    rows += [Variant("floor-liger", liger=True), Variant("peft-lora-liger", "peft-lora", liger=True)]
    rows += [Variant(_name("peft-dora", run), "peft-dora", run=run) for run in RUNS[:2]]
    rows += [Variant("peft-lora-plain-compiled", "peft-lora", run="compiled", plain=True)]
    rows += [Variant("lora-plain-compiled", "lora", "dense", "compiled", plain=True)]
    for method in OURS:
        for backend in DEFAULT_BACKENDS:
            if not malora.BACKENDS[backend].graph_safe:
                rows += [Variant(f"{method}-{backend}", method, backend)] if method in ROUTED else []
                continue
            others = ("eager", "compiled") if backend == "dense" else ("compiled",)  # one that a CPU has
            for run in RUNS if method in MAIN else others:
                rows.append(Variant(_name(f"{method}-{backend}", run), method, backend, run))
            if backend == "fused":  # with Liger's kernels around it, as bench.train has it
                name = f"{method}-{backend}-liger"
                rows += [Variant(_name(name, run), method, backend, run, liger=True) for run in ("eager", "captured")]
    rows += [Variant(f"{m}-fp8-liger-captured", m, "fp8", "captured", liger=True) for m in ("lora", "malora")]
    rows += [Variant("molora-loop", "molora", "loop")]
    rows += [Variant(_name(f"{m}-sorted", run), m, "sorted", run) for m in ("molora", "malora") for run in RUNS]
    return {row.name: row for row in rows}


def choose(names: list[str], mode: str, device: torch.device) -> list[Variant]:
    """The variants that a user's names mean: "all", a method (its rows and the baselines), or a row.

    A CPU has no graphs and compiles for longer than it then runs, so "all" and a method mean their eager rows there. In
    decode a compiled layer would be compiled once for each layer of the cache, so the graph is what is offered.

    Raises:
        UserError: a name is no method and no row, or a row that cannot run here.
    """
    rows = variants()
    on_cpu = device.type == "cpu"
    runs = {"eager"} if on_cpu else set(RUNS) - ({"compiled"} if mode == "decode" else set())
    chosen: list[str] = []
    for name in names:
        group = [row.name for row in rows.values() if name == "all" or (name in OURS and row.method == name)]
        if group:
            group = [row for row in rows if row in group or row in BASELINES]
            chosen += [row for row in group if rows[row].run in runs and not (on_cpu and rows[row].needs_gpu)]
        elif name in rows:
            if rows[name].needs_gpu and on_cpu:
                raise UserError(f"{name} needs a GPU: it is a CUDA graph, or made of Triton kernels.")
            chosen.append(name)
        else:
            methods = ", ".join(("all", *OURS))
            raise UserError(f"unknown variant {name!r}; there are {methods}, and the rows {', '.join(rows)}.")
    return [rows[name] for name in dict.fromkeys(chosen)]


def _name(what: str, run: str) -> str:
    return what if run == "eager" else f"{what}-{run}"
