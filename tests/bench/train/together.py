"""Train small models, alone or as one of two processes that share every batch."""

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from bench.models.adapters import add_adapter
from bench.models.base import load, prepare
from bench.records.schema import RunConfig
from bench.runtime.processes import make_accelerator
from bench.train import loop
from bench.train.batching import Encoded, collate
from bench.train.step import TrainStep
from tests.bench.launch import require_two

METHODS = ("lora", "malora", "molora")
CPU = torch.device("cpu")
# Label tokens of the examples of a batch. Answers of mixed length give the processes unequal numbers of label tokens.
# A batch of one example gives one process none.
LABELS = {
    "letters": [1] * 8,
    "texts": [3, 60, 4, 50, 5, 70, 2, 40],
    "three": [3, 60, 4],
    "one": [12],
}
# Tokens per micro-batch: the whole batch, or two packed sequences.
MAX_TOKENS = {"whole": 4096, "split": 256}


def encode(labels, seed=7):
    """Draw examples with so many label tokens, and prompts of 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [Encoded(torch.randint(1, 60, (20 + n,), generator=generator).tolist(), n) for n in labels]


def adapted(base_folder, method):
    """Make a model whose up projections are not zero."""
    base, _ = load(prepare(str(base_folder)), CPU)
    model = add_adapter(base, method, {"lora_dropout": 0.0}, seed=0).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "malora_B" in name or "lora_B" in name:
                parameter.normal_(generator=generator, std=0.1)
    return model


def one_step(base_folder, method, labels, max_tokens):
    """Return the losses and the gradients of one batch."""
    accelerator = make_accelerator("no")
    model = adapted(base_folder, method)
    wrapped = accelerator.prepare(model)
    micro_batches = collate(
        encode(labels),
        0,
        row_length=128,
        max_tokens=max_tokens,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    losses = torch.stack(TrainStep(model, wrapped, accelerator, balance_factor=1.0)(micro_batches))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return accelerator.reduce(losses, "sum"), gradients


def training(base_folder, method, max_tokens):
    """Train for ten steps, with a log entry per step, and return the log.

    Batches have eight examples, and the last of each epoch has one.
    """
    config = RunConfig(
        profile="tiny", model="m", model_hash="", method=method, method_options={}, mixture="", format="letters",
        data_hash="", seed=0, learning_rate=1e-3, epochs=3, batch_size=8, warmup_ratio=0.0, weight_decay=0.0,
        balance_factor=0.5, max_grad_norm=0.5, max_length=128, device_type="cpu", max_steps=10, max_items=None,
    )  # fmt: skip
    labels = (LABELS["texts"] + LABELS["letters"] + LABELS["texts"])[:24] + LABELS["one"]
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "CHECK_EVERY", 1))
        stack.enter_context(patch.object(loop, "ROUTER_EVERY", 1))
        stack.enter_context(patch.dict(loop.MAX_TOKENS, cpu=max_tokens))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        log = loop.train(
            adapted(base_folder, method), encode(labels), config, pad_id=0, checkpoint=folder / "c.pt",
            checkpoint_every=100,
        )  # fmt: skip
    return {"curve": log.curve, "router": log.router, "tokens": log.tokens}


def results(base_folder):
    """Return the losses and gradients of all batches, and the logs of all trainings, by name."""
    found = {}
    for method in METHODS:
        for split, max_tokens in MAX_TOKENS.items():
            for kind, labels in LABELS.items():
                found["step", method, kind, split] = one_step(base_folder, method, labels, max_tokens)
            found["training", method, split] = training(base_folder, method, max_tokens)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    number = require_two()
    torch.save(results(sys.argv[1]), f"{sys.argv[2]}.{number}")
