"""Profiles, the three sizes of every experiment.

tiny takes minutes on a CPU, small takes one GPU, and paper has the paper's own size.

The paper's batches have two examples, or four in mixtures of domains, and there is an optimizer step after each. Steps
cannot be packed into one pass: each needs the weights that the one before it has written. So a step of the paper
profile has some 200 to 600 tokens, and a GPU is busy reading the frozen weights. The examples of a batch share one
sequence, whose length is one of a few (`bench.train.fixed_shapes`), so that few CUDA graphs serve all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tasks import MIXTURES, Generator, Hub, Source

SWEEP_SEED = 0  # of sweeps that try all rates; these runs are also runs of the table
TUNING_SEED = 99  # of sweeps that search, and of floors; these runs are in no row of a table
# From docs/notes/protocol-2026-12-01.md. The ratio is constant, so that the rates next to any method's best rate are
# equally close to it.
GRID = (1.2e-4, 1.8e-4, 2.7e-4, 4e-4, 6e-4, 9e-4, 1.35e-3, 2e-3, 3e-3, 4.5e-3)
OF_CLASSES = ("classify", "clinc", "procedural-classify")  # mixtures of texts to classify


@dataclass(frozen=True)
class Profile:
    """The size of an experiment.

    Unless said otherwise its values are the paper's for tasks (intra-domain).

    Attributes:
        name: Name of the profile.
        model: A built-in name of `bench.models.base`, a folder, or an id on the Hugging Face hub.
        source: Source of the data, unless `--data` names a folder.
        epochs: Passes over the training examples.
        batch_size: Examples, not tokens, per batch.
        rates: Learning rates that `--sweep` may try, in ascending order and the same for every method.
        first_rates: Rates that a sweep begins with, to go on next to the best one; see `bench.runs.sweep`. Without any,
            a sweep tries all rates.
        seeds: Runs per table row.
        mixtures: Substitutes for mixtures that the source does not have.
        inter: Fields with other values for mixtures of domains; see `on`.
        of_classes: Fields with other values for mixtures of texts to classify, and for each of their tasks.
        format: Prompt format, a name in `tasks.FORMATS`.
        rank_divisor: The paper's ranks are divided by it, for models much smaller than the paper's.
        paper_rate: The paper's learning rate.
        warmup_ratio: Share of the steps in which the learning rate rises to its maximum.
        weight_decay: Weight decay of AdamW.
        balance_factor: Weight of the balance loss.
        max_grad_norm: Gradients are clipped to this norm.
        max_length: Maximum tokens per training example.
        eval_batch_size: Items per forward pass in scoring.
        generation_batch_size: Answers generated at a time, which bounds the memory of the key-value cache.
        checkpoint_every: Steps between checkpoints.
        threads: CPU threads per run. The number is fixed, because sums in another order round differently.
    """

    name: str
    model: str
    source: Source
    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    seeds: int
    first_rates: tuple[float, ...] = ()
    mixtures: dict[str, str] = field(default_factory=dict)
    inter: dict[str, Any] = field(default_factory=dict)
    of_classes: dict[str, Any] = field(default_factory=dict)
    format: str = "letters"
    rank_divisor: int = 1
    paper_rate: float = 4e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    balance_factor: float = 0.01  # in the paper's tables; its text says 0.001
    max_grad_norm: float = 1.0
    max_length: int = 1024
    eval_batch_size: int = 64
    generation_batch_size: int = 64
    checkpoint_every: int = 200
    threads: int | None = None

    @property
    def sweep_seed(self) -> int:
        """The seed of a sweep's runs."""
        return TUNING_SEED if self.first_rates else SWEEP_SEED

    def on(self, mixture: str) -> Profile:
        """Return the profile for a mixture.

        The paper trains longer on domains, with another learning rate. Labels of texts to classify are asked for as
        words.
        """
        if mixture.partition("/")[0].partition("+")[0] in OF_CLASSES:
            return replace(self, **self.of_classes)
        return replace(self, **self.inter) if MIXTURES[mixture].domains else self


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="tiny",
            model="tiny",
            source=Generator(),
            mixtures={
                "intra": "procedural",
                "inter": "procedural-inter",
                "inter-open": "procedural-inter",
                "inter/mathematics": "procedural-inter/counting_train",
                "classify": "procedural-classify",
            },
            of_classes={"format": "cloze"},
            inter={"paper_rate": 5e-4, "rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)},
            rank_divisor=4,  # LoRA of rank 16 on a hidden size of 128
            epochs=1,
            batch_size=32,
            rates=(4e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
            seeds=3,
            threads=1,
        ),
        Profile(
            name="small",
            model="smollm2-135m",
            source=Hub(),
            epochs=2,
            batch_size=64,  # the paper's 2 leaves a GPU idle; the learning rates are tuned for 64
            rates=GRID,
            first_rates=(4e-4, 9e-4, 2e-3),
            inter={
                "format": "cloze",  # asked for a letter, the base answers A
                "epochs": 3,
                "paper_rate": 5e-4,
                # Batches of 128 were bound by kernel launches, and scoring took a third of a run's time.
                "eval_batch_size": 512,
            },
            of_classes={"format": "cloze", "epochs": 3, "eval_batch_size": 512},
            seeds=3,
            eval_batch_size=128,
            generation_batch_size=512,
        ),
        Profile(
            name="paper",
            model="meta-llama/Llama-2-7b-hf",
            source=Hub(),
            epochs=2,
            batch_size=2,
            rates=(1e-4, 2e-4, 4e-4, 8e-4),
            inter={"epochs": 3, "batch_size": 4, "paper_rate": 5e-4, "rates": (1.25e-4, 2.5e-4, 5e-4, 1e-3)},
            of_classes={"format": "cloze", "epochs": 3},
            seeds=1,
            eval_batch_size=16,
            generation_batch_size=32,
            checkpoint_every=1000,
        ),
    )
}


def default_profile() -> str:
    """Return "small" on a machine with a GPU, else "tiny"."""
    return "small" if torch.cuda.is_available() else "tiny"
