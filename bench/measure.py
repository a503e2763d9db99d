"""How the profiler measures: steps of training, prefill and decode, the clock, the device's ceilings, and what a step
launched.

Time is the device's own (events on a GPU), read after a whole sample, so that measuring waits for nothing in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from transformers import PreTrainedModel, StaticCache

import malora
from bench.attention import no_attention_mask
from bench.graph import add_up, capture, refreshing, warm_up
from bench.train import Stopwatch
from bench.variants import Subject

BALANCE_FACTOR = 0.01  # of the profiles' training
Done = Callable[[str], None]  # called as each part of a step is done


@dataclass(frozen=True)
class Work:
    """What every variant does in a step. In decode, `length` is the prompt's and `tokens` those that are made."""

    mode: str
    batch: int
    length: int
    tokens: int
    dropout: float
    vocab_size: int

    def ids(self, batch: int, device: torch.device) -> Tensor:
        """The step's random token ids, the same for every variant: [micro-batches, batch, length]."""
        sequences = self.tokens // self.length if self.mode == "train" else batch
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (sequences, self.length), generator=generator)
        return ids.unflatten(0, (-1, batch)).to(device)


class TrainStep:
    """Forward and backward over micro-batches, then AdamW: next-token cross entropy, plus the balance loss."""

    def __init__(self, subject: Subject, work: Work, batch: int) -> None:
        self.subject = subject
        self.ids = work.ids(batch, subject.device)
        self.routed = malora.has_router(subject.model)
        self.parameters = [p for p in subject.model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.parameters:
            # The rate changes nothing about the time; a small one keeps the loss finite for as long as it takes.
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=subject.device.type == "cuda")
        self.captured = subject.variant.run == "captured"
        if self.captured:
            self.static_ids = self.ids[0].clone()
            warm_up(self._gradients_of_static_ids)
            self.weights = malora.HeldWeights(subject.model)
            self.refresh = refreshing(self.weights)
            with self.weights:
                self.graph = capture(self._gradients_of_static_ids, passes=0)
            self.gradients = [parameter.grad for parameter in self.parameters]

    def __call__(self, done: Done) -> None:
        sums = None
        if self.captured:
            self.refresh()
        for ids in self.ids:
            if self.captured:
                self.static_ids.copy_(ids)
                self.graph.replay()
                sums = add_up(sums, self.gradients, alone=len(self.ids) == 1)
                done("forward_backward")
                continue
            loss = self._forward(ids)
            done("forward")
            loss.backward()
            done("backward")
        if self.captured:
            for parameter, gradient in zip(self.parameters, sums, strict=True):
                parameter.grad = gradient
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        done("optimizer")

    def _gradients_of_static_ids(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None  # new ones, in the graph's memory
        self._forward(self.static_ids).backward()

    def _forward(self, ids: Tensor) -> Tensor:
        with self.subject.precision(), no_attention_mask(self.subject.model):
            loss = self.subject.model(input_ids=ids, labels=ids, use_cache=False).loss
        if self.routed:
            loss = loss + BALANCE_FACTOR * malora.balance_loss(self.subject.model)
        return loss / len(self.ids)


class PrefillStep:
    """One forward pass without gradients; logits of the last position, as before a generation."""

    def __init__(self, subject: Subject, work: Work, batch: int) -> None:
        self.model = subject.model
        self.ids = work.ids(batch, subject.device)[0]
        self.run = self._forward
        if subject.variant.run == "captured":
            self.run = capture(self._forward).replay

    def __call__(self, done: Done) -> None:
        self.run()
        done("forward")

    @torch.no_grad()
    def _forward(self) -> None:
        with no_attention_mask(self.model):
            self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1)


class DecodeStep:
    """Greedy generation, token by token: a prompt's prefill and `tokens` new tokens.

    Eager rows call `model.generate`, which is what a user calls. Captured rows replay one token as a CUDA graph over a
    static cache; the prompt's pass is not in the graph.
    """

    def __init__(self, subject: Subject, work: Work, batch: int) -> None:
        self.model, self.tokens = subject.model, work.tokens
        self.prompt = work.ids(batch, subject.device)[0]
        self.static = subject.variant.run != "eager"
        if self.static:
            config = self.model.config
            self.cache = StaticCache(config=config, max_cache_len=work.length + work.tokens)
            heads, width = config.num_key_value_heads, config.head_dim
            self.cache.early_initialization(batch, heads, width, self.model.dtype, subject.device)
            self.token = self.prompt[:, :1].clone()
            self.next = lambda: self._forward(self.token)
            if subject.variant.run == "captured":
                self._forward(self.prompt)
                self.next = capture(self.next).replay

    def __call__(self, done: Done) -> Tensor:
        if not self.static:
            new = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens, "do_sample": False}
            ids = self.model.generate(input_ids=self.prompt, attention_mask=torch.ones_like(self.prompt), **new)
            done("generate")
            return ids[:, self.prompt.shape[1] :]
        self.cache.reset()
        self._forward(self.prompt)
        made = [self.token.clone()]
        for _ in range(self.tokens - 1):
            self.next()
            made.append(self.token.clone())
        done("generate")
        return torch.cat(made, dim=1)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))


STEPS: dict[str, Callable[[Subject, Work, int], Callable[[Done], Any]]] = {
    "train": TrainStep,
    "prefill": PrefillStep,
    "decode": DecodeStep,
}


def time_steps(step: Callable[[Done], Any], samples: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds by part, and of the whole as "step", of steps that follow each other without a wait."""
    watches = [Stopwatch(device) for _ in range(samples)]
    for watch in watches:
        watch.start()
        step(watch.done)
    found: list[dict[str, float]] = []
    for watch in watches:
        seconds: dict[str, float] = {}
        watch.add_to(seconds)
        found.append(seconds | {"step": sum(seconds.values())})
    return found


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
          "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel")
_RANGE = "bench.speed: one step"
LONGEST_KERNELS, KERNEL_NAME = 16, 100  # how many are named in a record, and how much of a name says what it is


def count(step: Callable[[Done], Any], device: torch.device) -> dict[str, Any]:
    """Kernels that ran in a step, launches by the host (a graph is one), and times that the host waited.

    "where" has the kernels that took longest, as [name, calls, seconds]. All are None on a CPU. A copy to the host of
    pageable memory is a wait too: the runtime synchronises the stream for it.
    """
    if device.type != "cuda":
        return dict.fromkeys(("kernels", "launches", "synchronisations", "where"))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(_RANGE):
            step(lambda part: None)
        torch.cuda.synchronize()  # outside the range: the profiler's own wait is not the step's
    events = profile.profiler.kineto_results.events()
    span = next(e for e in events if e.name() == _RANGE and e.device_type() == DeviceType.CPU)
    start, end = span.start_ns(), span.start_ns() + span.duration_ns()
    on_host = [e.name() for e in events if e.device_type() == DeviceType.CPU and start <= e.start_ns() <= end]
    on_device: dict[str, list[int]] = {}
    for event in events:
        if event.device_type() == DeviceType.CUDA and event.name() != _RANGE:  # the range is shown on the device too
            on_device.setdefault(event.name(), []).append(event.duration_ns())
    longest = sorted(on_device.items(), key=lambda item: -sum(item[1]))[:LONGEST_KERNELS]
    return {
        "kernels": sum(len(d) for name, d in on_device.items() if not name.startswith(("Memcpy", "Memset"))),
        "launches": sum(name.startswith(_LAUNCHES) for name in on_host),
        "synchronisations": sum(name in _WAITS for name in on_host),
        "where": [[name[:KERNEL_NAME], len(d), sum(d) / 1e9] for name, d in longest],
    }


def backbone_flops(base: PreTrainedModel, work: Work) -> int | None:
    """Matrix operations of the frozen backbone in a step; None for decode, which is bound by memory.

    A token costs 2 operations a weight of the linear maps, and 2·S·h a layer for causal attention over S tokens of
    width h. A backward pass down to the activations costs the first once more and the second twice. What an adapter
    adds is not counted: a row's share of the device's rate says how near it is to the work that cannot be left out.
    """
    if work.mode == "decode":
        return None
    linear = 2 * sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    attention = 2 * work.length * base.config.hidden_size * base.config.num_hidden_layers
    return work.tokens * (2 * linear + 3 * attention if work.mode == "train" else linear + attention)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device can do at best: a large square product, and a large copy, counting what is read and written."""
    on_gpu = device.type == "cuda"
    size, copied = (8192, 2**30) if on_gpu else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "matrix_flops_per_second": 2 * size**3 / _best(lambda: torch.mm(a, b), device),
        "copy_bytes_per_second": 2 * copied / _best(lambda: target.copy_(source), device),
    }


def heat(device: torch.device, seconds: float) -> None:
    """Has a GPU make products for so long; nothing elsewhere."""
    if device.type == "cuda":
        a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(100):  # some 20 ms
                torch.mm(a, b)
            torch.cuda.synchronize()


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the fastest of twenty: a ceiling is what was reached once."""
    for _ in range(3):
        run()

    def step(done: Done) -> None:
        run()
        done("run")

    return min(sample["step"] for sample in time_steps(step, 20, device))


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the call and what it launched were done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
