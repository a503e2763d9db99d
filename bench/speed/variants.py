"""The variants to benchmark: a frozen backbone, alone or with an adapter.

The adapter is computed in a given way. Each variant is one row of the table. It is run in one of three ways. "eager"
runs the model as it is. "compiled" compiles each decoder layer and the loss with torch.compile. "captured" is compiled
and then replayed as a CUDA graph. With faster kernels for the frozen layers no decoder layer is compiled, because they
already fuse what the compiler would fuse.

The variants named "floor" are the frozen backbone: a forward pass, and in training a backward pass to the activations.
No adapter on that backbone can be faster.

Precision: the backbone is in bfloat16 on a GPU. PEFT keeps its adapters in float32 on such a base by default, and so do
ours. They train under bfloat16 autocast, like the Trainer with `bf16=True`. The adapter of a `plain` variant is in
bfloat16 and trains without autocast. For inference, an out-of-the-box PEFT variant keeps what `get_peft_model` gives:
float32 adapters without autocast. Every other variant is cast to bfloat16, which takes a user one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftConfig

import malora
from bench.errors import UserError, unknown_name


@dataclass(frozen=True)
class Variant:
    """A frozen backbone alone, or with an adapter that is computed in a given way.

    Attributes:
        name: Name in records and tables.
        method: Name in `CONFIGS`; None for the frozen backbone alone.
        backend: For our methods, one of `malora.BACKENDS`, or "loop" of `bench.speed.baselines`; None for PEFT's.
        run: "eager", "compiled" or "captured".
        plain: Whether the adapter is in bfloat16 and trains without autocast.
        liger: Whether the frozen layers use faster kernels: Liger's, out of the box and with its loss, in variants that
            are not ours; those of `malora.optimize_backbone` in ours. The names of both are those of older records.
    """

    name: str
    method: str | None = None
    backend: str | None = None
    run: str = "eager"
    plain: bool = False
    liger: bool = False

    @property
    def needs_gpu(self) -> bool:
        """True if the variant uses CUDA graphs or Triton kernels."""
        return self.run == "captured" or self.backend in ("fused", "fp8") or self.liger

    @property
    def out_of_the_box(self) -> bool:
        """True if the variant is a PEFT adapter with PEFT's defaults."""
        return self.method is not None and self.backend is None and self.run == "eager" and not self.plain


# PEFT's LoRA and DoRA, LoRA through our layer with one expert, and the paper's other methods.
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "peft-lora": malora.METHODS["lora"],
    "peft-dora": malora.METHODS["dora"],
    "lora": partial(malora.METHODS["asylora"], r=64, lora_alpha=128, freeze=[]),
    **{
        name: partial(malora.make_config, name) for name in ("asylora", "molora", "moasylora", "malora", "malora-small")
    },
}
OURS = tuple(name for name in CONFIGS if not name.startswith("peft-"))


def our_config(method: str) -> malora.MaloraConfig:
    """Return the default config of one of `OURS`."""
    config = CONFIGS[method]()
    assert isinstance(config, malora.MaloraConfig), method
    return config


ROUTED = tuple(name for name in OURS if our_config(name).has_router)
# Left out: "reference", which the tests compare the others with; backends that are not exact; "auto", which picks one
# of the others; and "sorted", which only some methods are measured with.
DEFAULT_BACKENDS = tuple(
    name for name, backend in malora.BACKENDS.items() if backend.exact and name not in ("auto", "reference", "sorted")
)
FULLY_COMPARED = ("lora", "molora", "malora")  # run in every way; the others eagerly and in their fastest way only
RUNS = ("eager", "compiled", "captured")
# The variants of a method are compared with these, so asking for a method by name measures them too.
BASELINES = ("floor", "floor-compiled", "floor-captured", "peft-lora", "peft-lora-compiled", "peft-lora-captured",
             "lora-plain-compiled")  # fmt: skip


def variants() -> dict[str, Variant]:
    """Return all variants by name, in the order of the table."""
    found = [*_baseline_variants()]
    for method in OURS:
        for backend in DEFAULT_BACKENDS:
            found += _variants_of(method, backend)
    found += [Variant(f"{m}-fp8-liger-captured", m, "fp8", "captured", liger=True) for m in ("lora", "malora")]
    found += [Variant("molora-loop", "molora", "loop")]
    found += [Variant(_name(f"{m}-sorted", run), m, "sorted", run) for m in ("molora", "malora") for run in RUNS]
    return {variant.name: variant for variant in found}


def _baseline_variants() -> list[Variant]:
    found = [Variant(_name("floor", run), run=run) for run in RUNS]
    found += [Variant(_name("peft-lora", run), "peft-lora", run=run) for run in RUNS]
    found += [Variant("floor-liger", liger=True), Variant("peft-lora-liger", "peft-lora", liger=True)]
    found += [Variant(_name("peft-dora", run), "peft-dora", run=run) for run in ("eager", "compiled")]
    found += [Variant("peft-lora-plain-compiled", "peft-lora", run="compiled", plain=True)]
    found += [Variant("lora-plain-compiled", "lora", "dense", "compiled", plain=True)]
    return found


def _variants_of(method: str, backend: str) -> list[Variant]:
    """Return the variants of one of our methods with one of `DEFAULT_BACKENDS`."""
    name = f"{method}-{backend}"
    if not malora.BACKENDS[backend].graph_safe:
        return [Variant(name, method, backend)] if method in ROUTED else []
    runs: tuple[str, ...] = RUNS
    if method not in FULLY_COMPARED:
        runs = ("eager", "compiled") if backend == "dense" else ("compiled",)  # a CPU runs the eager one
    found = [Variant(_name(name, run), method, backend, run) for run in runs]
    if backend == "fused":  # with faster kernels around it, as `bench` trains
        found += [
            Variant(_name(f"{name}-liger", run), method, backend, run, liger=True) for run in ("eager", "captured")
        ]
    return found


def select_variants(names: list[str], mode: str, device: torch.device) -> list[Variant]:
    """Return the variants that a user asked for.

    A name is "all", a method (its variants and the baselines) or a variant. "all" and methods select eager variants
    only on a CPU: it has no CUDA graphs, and compiling takes longer than the benchmark. In decode they leave out
    compiled variants, because the compiler would compile a layer once per layer of the cache.

    Raises:
        UserError: If a name is neither a method nor a variant, or if the variant needs a GPU and there is none.
    """
    known = variants()
    on_cpu = device.type == "cpu"
    runs = {"eager"} if on_cpu else set(RUNS) - ({"compiled"} if mode == "decode" else set())
    chosen: list[str] = []
    for name in names:
        of_method = {v.name for v in known.values() if name == "all" or (name in OURS and v.method == name)}
        if of_method:
            group = [v for v in known.values() if v.name in of_method or v.name in BASELINES]
            chosen += [v.name for v in group if v.run in runs and not (on_cpu and v.needs_gpu)]
        elif name in known:
            if known[name].needs_gpu and on_cpu:
                raise UserError(f"{name} needs a GPU: it uses CUDA graphs or Triton kernels.")
            chosen.append(name)
        else:
            raise UserError(f"{unknown_name('variant', name, ['all', *OURS, *known])}.")
    return [known[name] for name in dict.fromkeys(chosen)]


def _name(base: str, run: str) -> str:
    return base if run == "eager" else f"{base}-{run}"
