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

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import malora
from bench import UserError
from bench.liger import LigerKernels, has_liger
from malora.backends import INEXACT, WAIT_FOR_THE_HOST


@dataclass(frozen=True)
class Shape:
    """A backbone, and what one step on it is: `tokens` in micro-batches of `batch` sequences of `length`."""

    config: dict[str, Any]
    batch: int
    length: int
    tokens: int
    prompt: int = 128  # for decode
    new_tokens: int = 64


SHAPES: dict[str, Shape] = {
    "llama2-7b": Shape(
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "vocab_size": 32000},
        batch=4, length=1024, tokens=16384,  # the paper's tokens a step
    ),
    "smollm2-135m": Shape(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        batch=16, length=128, tokens=2048,
    ),
    "toy": Shape(
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 512},
        batch=4, length=64, tokens=512, prompt=16, new_tokens=8,  # under a second a step on two CPU cores
    ),
}  # fmt: skip


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
    def as_it_comes(self) -> bool:
        return self.method is not None and self.backend is None and self.run == "eager" and not self.plain


# LoRA of PEFT, the same through our layer with one expert, and the paper's others.
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "peft-lora": malora.METHODS["lora"],
    "peft-dora": malora.METHODS["dora"],
    "lora": partial(malora.METHODS["asylora"], r=64, lora_alpha=128, freeze=[]),
    **{name: malora.METHODS[name] for name in ("asylora", "molora", "moasylora", "malora", "malora-small")},
}
OURS = tuple(name for name in CONFIGS if not name.startswith("peft-"))
ROUTED = tuple(name for name in OURS if CONFIGS[name]().has_router)
# Without the oracle, what is not exact, and `sorted`, which few have rows of. "auto" is one of the others.
DEFAULT_BACKENDS = tuple(name for name in malora.BACKENDS if name not in ("auto", "reference", "sorted", *INEXACT))
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
            if backend in WAIT_FOR_THE_HOST:
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


def backbone(shape: Shape, layers: int | None, device: torch.device) -> PreTrainedModel:
    """A frozen Llama of random weights (normal, std 0.02): bfloat16 on a GPU, float32 on a CPU."""
    settings = shape.config | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**settings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


class Subject:
    """A variant that was built: its model, whose frozen weights are those of the one backbone that all share.

    What is the variant's own can be parked in the host's memory while others are measured. Its modules and parameters
    stay the same objects, so that nothing has to be compiled twice.

    Raises:
        UserError: the variant needs a package that is not installed.
    """

    def __init__(self, variant: Variant, base: PreTrainedModel, mode: str, dropout: float) -> None:
        training = mode == "train"
        self.variant, self.device = variant, base.device
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model: nn.Module = copy.deepcopy(base, dict(shared))
        self.kernels: AbstractContextManager = nullcontext()
        if variant.liger:
            if not has_liger():
                raise UserError("liger_kernel is not installed")
            self.kernels = LigerKernels(self.model, as_it_comes=variant.backend is None)
        narrow = variant.plain or not (training or variant.as_it_comes)
        dtype = base.dtype if narrow else torch.float32
        if variant.method is not None:
            self.model = self._adapt(variant, dropout, dtype)
        self.own: list[Tensor] = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in shared]
        self.autocast = training and dtype != base.dtype and variant.method is not None
        if training and variant.method is None:
            # The floor's backward pass goes down to the activations.
            self.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        self.model.train(training)
        if variant.run != "eager" and mode != "decode" and not variant.liger:
            _compile_layers(self.model)
        if variant.run != "eager" and training:
            _compile_loss(self.model)

    def _adapt(self, variant: Variant, dropout: float, dtype: torch.dtype) -> nn.Module:
        options = {"lora_dropout": dropout} | ({"backend": variant.backend} if variant.backend else {})
        config = CONFIGS[variant.method](**options)
        ours = isinstance(config, malora.MaloraConfig)
        torch.manual_seed(0)
        # The paper's start takes a singular value decomposition a layer, minutes at 7B, and leaves B at zero, which no
        # trained adapter has: ours are made without values, and get random ones.
        model = get_peft_model(self.model, config, low_cpu_mem_usage=ours)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not ("lora_" in name or parameter.requires_grad or parameter.is_meta):
                    continue
                value = torch.empty(parameter.shape, dtype=dtype, device=self.device)
                keep = not parameter.is_meta and parameter.any()
                value = value.copy_(parameter) if keep else value.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        return model

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def load(self) -> None:
        self.kernels.__enter__()
        for tensor in self.own:
            tensor.data = tensor.data.to(self.device)

    def park(self) -> None:
        self.kernels.__exit__(None, None, None)
        for tensor in self.own:
            tensor.grad = None
            tensor.data = tensor.data.to("cpu")
        for module in self.model.modules():
            if isinstance(module, malora.MaloraLayer):
                module.siblings.release(frozen=True)


def _compile_loss(model: nn.Module) -> None:
    """Cross entropy in float32 as it comes writes the logits in float32, their softmax, and the gradients of both."""
    base = _base(model)
    base.loss_function = torch.compile(base.loss_function)


def _compile_layers(model: nn.Module) -> None:
    base = _base(model)
    for module in base.modules():
        if type(module).__name__ in base._no_split_modules:
            module.compile()


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
