"""How the profiler measures: steps of training, prefill and decode, the clock, the device's ceilings, and what a step
launched.

Time is the device's own (events on a GPU), read after a whole sample, so that measuring waits for nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import malora
from bench.runtime.attention import no_attention_mask
from bench.speed.subject import Subject
from malora.backbone.cuda_graphs import accumulate_grads, capture, capture_refresh, warm_up

BALANCE_FACTOR = 0.01  # of the profiles' training
PhaseCallback = Callable[[str], None]  # called as each part of a step is done


@dataclass(frozen=True)
class Workload:
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

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
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
            self.weights = malora.WeightCache(subject.model)
            self.refresh = capture_refresh(self.weights)
            with self.weights:
                self.graph = capture(self._gradients_of_static_ids, passes=0)
            self.gradients = [parameter.grad for parameter in self.parameters]

    def __call__(self, end_phase: PhaseCallback) -> None:
        sums = None
        if self.captured:
            self.refresh()
        for ids in self.ids:
            if self.captured:
                self.static_ids.copy_(ids)
                self.graph.replay()
                sums = accumulate_grads(sums, self.gradients, alone=len(self.ids) == 1)
                end_phase("forward_backward")
                continue
            loss = self._forward(ids)
            end_phase("forward")
            loss.backward()
            end_phase("backward")
        if self.captured:
            for parameter, gradient in zip(self.parameters, sums, strict=True):
                parameter.grad = gradient
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end_phase("optimizer")

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

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
        self.model = subject.model
        self.ids = work.ids(batch, subject.device)[0]
        self.run = self._forward
        if subject.variant.run == "captured":
            self.run = capture(self._forward).replay

    def __call__(self, end_phase: PhaseCallback) -> None:
        self.run()
        end_phase("forward")

    @torch.no_grad()
    def _forward(self) -> None:
        with no_attention_mask(self.model):
            self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1)


class DecodeStep:
    """Greedy generation, token by token: a prompt's prefill and `tokens` new tokens.

    Eager rows call `model.generate`, which is what a user calls. Captured rows replay one token as a CUDA graph over a
    static cache; the prompt's pass is not in the graph.
    """

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
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

    def __call__(self, end_phase: PhaseCallback) -> Tensor:
        if not self.static:
            new = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens, "do_sample": False}
            ids = self.model.generate(input_ids=self.prompt, attention_mask=torch.ones_like(self.prompt), **new)
            end_phase("generate")
            return ids[:, self.prompt.shape[1] :]
        self.cache.reset()
        self._forward(self.prompt)
        made = [self.token.clone()]
        for _ in range(self.tokens - 1):
            self.next()
            made.append(self.token.clone())
        end_phase("generate")
        return torch.cat(made, dim=1)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))


STEPS: dict[str, Callable[[Subject, Workload, int], Callable[[PhaseCallback], Any]]] = {
    "train": TrainStep,
    "prefill": PrefillStep,
    "decode": DecodeStep,
}
