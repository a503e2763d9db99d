"""Define the steps that are timed: training, prefill and decode.

A step is a callable. It calls `end_phase(name)` at the end of each phase, so that a timer can attribute the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import malora
from bench.speed.subject import Subject
from malora.backbone.causal_attention import no_attention_mask
from malora.backbone.cuda_graphs import capture

# The value does not affect the time. A small one keeps the loss finite over the whole benchmark.
LEARNING_RATE = 1e-5
PhaseCallback = Callable[[str], None]  # called with a phase's name when the phase has ended


def ignore_phase(phase: str) -> None:
    """Do nothing with a phase's end: the callback of steps that are not timed."""


@dataclass(frozen=True)
class Workload:
    """The work of one step, the same for every variant.

    Attributes:
        mode: "train", "prefill" or "decode".
        batch: Sequences per pass.
        length: Tokens per sequence; in decode, of the prompt.
        tokens: Tokens per training step; in decode, new tokens per sequence.
        dropout: Dropout of the adapters, in training.
        vocab_size: Number of token ids to draw from.
    """

    mode: str
    batch: int
    length: int
    tokens: int
    dropout: float
    vocab_size: int

    def ids(self, batch: int, device: torch.device) -> Tensor:
        """Return the step's random token ids [micro-batches, batch, length].

        They are the same for every variant.
        """
        sequences = self.tokens // self.length if self.mode == "train" else batch
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (sequences, self.length), generator=generator)
        return ids.view(-1, batch, self.length).to(device)


class TrainStep:
    """Forward and backward over micro-batches, then AdamW.

    The loss is the model's: next-token cross entropy, plus the load-balancing loss of routed adapters. A captured
    variant goes through `malora.capture_step`, and the others through a plain loop, as users write it.
    """

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
        self.subject = subject
        self.ids = work.ids(batch, subject.device)
        self.parameters = [p for p in subject.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=subject.device.type == "cuda")
        self.captured: malora.CapturedStep | None = None
        if subject.variant.run == "captured":
            self.captured = malora.capture_step(subject.model, lambda _, ids: self._loss(ids))
            for _ in range(3):  # the third pass is captured
                self.captured.backward(self.ids[0])
            self._zero_grad()

    def __call__(self, end_phase: PhaseCallback) -> None:
        """Run one training step."""
        if self.captured is not None:
            self.captured(list(self.ids))
            end_phase("forward_backward")
        else:
            self._run(end_phase)
        if self.optimizer is not None:
            self.optimizer.step()
            self._zero_grad()
        end_phase("optimizer")

    def _run(self, end_phase: PhaseCallback) -> None:
        for ids in self.ids:
            loss = self._loss(ids)
            end_phase("forward")
            loss.backward()
            end_phase("backward")

    def _zero_grad(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def _loss(self, ids: Tensor) -> Tensor:
        with self.subject.precision(), no_attention_mask(self.subject.model):
            loss: Tensor = self.subject.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss / len(self.ids)


class PrefillStep:
    """One forward pass without gradients, as before a generation.

    It computes the logits of the last position only.
    """

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
        self.model = subject.model
        self.ids = work.ids(batch, subject.device)[0]
        self.run = self._forward
        if subject.variant.run == "captured":
            self.run = capture(self._forward).replay

    def __call__(self, end_phase: PhaseCallback) -> None:
        """Run one forward pass."""
        self.run()
        end_phase("forward")

    @torch.no_grad()
    def _forward(self) -> None:
        with no_attention_mask(self.model):
            self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1)


class DecodeStep:
    """Greedy generation: the prefill of a prompt, then `tokens` new tokens one by one.

    Eager variants call `model.generate`, as a user does. Captured variants use a static cache and replay the pass of
    one token as a CUDA graph. The prompt's pass is not in the graph.
    """

    def __init__(self, subject: Subject, work: Workload, batch: int) -> None:
        self.model, self.tokens = subject.model, work.tokens
        self.prompt = work.ids(batch, subject.device)[0]
        self.static = subject.variant.run != "eager"
        if self.static:
            self.cache = _static_cache(self.model, batch, work.length + work.tokens)
            self.token = self.prompt[:, :1].clone()
            self.next: Callable[[], object] = lambda: self._forward(self.token)
            if subject.variant.run == "captured":
                self._forward(self.prompt)
                self.next = capture(self.next).replay

    def __call__(self, end_phase: PhaseCallback) -> Tensor:
        """Generate; return the new token ids [batch, tokens]."""
        tokens = self._decode() if self.static else self._generate()
        end_phase("generate")
        return tokens

    def _generate(self) -> Tensor:
        generate: Any = self.model.generate  # of transformers' GenerationMixin, which the model's type does not show
        ids: Tensor = generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            do_sample=False,
        )
        return ids[:, self.prompt.shape[1] :]

    def _decode(self) -> Tensor:
        self.cache.reset()
        self._forward(self.prompt)
        tokens = [self.token.clone()]
        for _ in range(self.tokens - 1):
            self.next()
            tokens.append(self.token.clone())
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))


def _static_cache(model: Any, batch: int, length: int) -> StaticCache:
    """Return an empty key-value cache of a fixed size."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


STEPS: dict[str, Callable[[Subject, Workload, int], Callable[[PhaseCallback], Any]]] = {
    "train": TrainStep,
    "prefill": PrefillStep,
    "decode": DecodeStep,
}
