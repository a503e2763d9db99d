"""Train LoRA with Unsloth, one optimizer step per command.

This is a program of its own, which imports nothing of this repository: Unsloth patches transformers, and needs other
versions of some packages. It reads a JSON object per line and answers each with one:

| command | answer |
| --- | --- |
| {"do": "prepare", "folder": ..., "ids": [micro-batches, batch, length], "dropout": ..., ...} | {"package": ...} |
| {"do": "step"} | {"seconds": ..., "loss": ...} |
| {"do": "peak"} | {"allocated": ..., "reserved": ...} in bytes, or nulls on a CPU |
| {"do": "rest"} | {}: memory that is not needed between steps is given back |

An error is {"error": ..., "out_of_memory": ...}. Whatever Unsloth prints goes to standard error.
"""

# ruff: noqa: E402, I001
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from typing import Any

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import unsloth  # before torch and transformers, which it patches
import torch
from torch import Tensor, nn
from unsloth import FastLanguageModel

LEARNING_RATE = 1e-5  # as in the other programs
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def train(
    folder: str, batches: list[list[dict[str, Tensor]]], dropout: float, checkpointing: bool, in_4_bits: bool
) -> Generator[Tensor]:
    """Train as a user of Unsloth does, in a plain loop. Yields the loss after each optimizer step."""
    saves: Any = "unsloth" if checkpointing else False
    length = batches[0][0]["input_ids"].shape[1]
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=in_4_bits, use_exact_model_name=True,
        local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=64, lora_alpha=128, lora_dropout=dropout, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=saves,
    )  # fmt: skip
    FastLanguageModel.for_training(model, use_gradient_checkpointing=saves)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    while True:
        for micro_batches in batches:
            for micro_batch in micro_batches:
                with torch.autocast(parameters[0].device.type, torch.bfloat16):
                    loss = model(**micro_batch).loss
                (loss / len(micro_batches)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss


class Worker:
    """Answers the commands. The methods are named after them."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.losses: Generator[Tensor] | None = None

    def prepare(
        self, folder: str, ids: list[list[list[int]]], dropout: float, checkpointing: bool, in_4_bits: bool
    ) -> dict[str, Any]:
        """Start the program. The model is loaded in the first step."""
        device = "cuda" if self.on_gpu else "cpu"
        step = [{"input_ids": batch, "labels": batch} for batch in torch.tensor(ids, device=device)]
        self.losses = train(folder, [step], dropout, checkpointing, in_4_bits)
        return {"package": f"unsloth {unsloth.__version__}"}

    def step(self) -> dict[str, Any]:
        """Run an optimizer step."""
        assert self.losses is not None, "prepared"
        self._synchronize()
        start = time.perf_counter()
        loss = next(self.losses)
        self._synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": loss.item()}

    def peak(self) -> dict[str, Any]:
        """Return the peak of GPU memory since the start."""
        if not self.on_gpu:
            return {"allocated": None, "reserved": None}
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def rest(self) -> dict[str, Any]:
        """Give memory back that is not needed between steps."""
        if self.on_gpu:
            torch.cuda.empty_cache()
        return {}

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def main() -> None:
    """Answer commands until the input ends."""
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # the caller turns it into the reason of a row
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            answer = {"error": f"{type(error).__name__}: {error}", "out_of_memory": out_of_memory}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
