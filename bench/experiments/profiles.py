"""Three sizes of the same experiments: tiny (a CPU, minutes), small (one GPU), paper (the paper's own)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tasks import MIXTURES, Generator, Hub, Source


@dataclass(frozen=True)
class Profile:
    """What an experiment's size is made of. Unless said otherwise the values are the paper's (intra-domain).

    Attributes:
        model: a name in `bench.model.BUILT_IN`, a folder or a hub id.
        source: where data comes from unless `--data` names a folder.
        mixtures: stand-ins, for a profile whose source does not have an experiment's mixture.
        inter: what is otherwise for mixtures of domains, by field; see `on`.
        format: how questions are put, a name in `tasks.FORMATS`.
        rank_divisor: the paper's ranks are divided by it, for models much smaller than the paper's.
        epochs, batch_size: examples, not tokens, a batch.
        generation_batch_size: answers that are written at a time; it bounds the cache of keys and values.
        rates: what `--sweep` tries, for every method alike; they contain the paper's.
        seeds: runs a row of a table.
        checkpoint_every: steps between checkpoints.
        threads: of a CPU run; fixed, because sums in another order round otherwise.
    """

    name: str
    model: str
    source: Source
    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    seeds: int
    mixtures: dict[str, str] = field(default_factory=dict)
    inter: dict[str, Any] = field(default_factory=dict)
    format: str = "letters"
    rank_divisor: int = 1
    paper_rate: float = 4e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    balance_factor: float = 0.01  # of the paper's tables; its text says 0.001
    max_grad_norm: float = 1.0
    max_length: int = 1024
    eval_batch_size: int = 64
    generation_batch_size: int = 64
    checkpoint_every: int = 200
    threads: int | None = None

    def on(self, mixture: str) -> Profile:
        """The profile for a mixture: the paper trains on domains at another rate and for another time."""
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
            },
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
            batch_size=64,  # the paper's 2 would leave a GPU idle; the rates are tuned for this one
            rates=(2e-4, 4e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
            inter={
                "format": "cloze",  # asked for a letter, the base answers A
                "epochs": 3,
                "paper_rate": 5e-4,
                "rates": (2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3),
                "eval_batch_size": 512,  # a batch of 128 waits for its launches: scoring was a third of a run's time
            },
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
            seeds=1,
            eval_batch_size=16,
            generation_batch_size=32,
            checkpoint_every=1000,
        ),
    )
}


def default_profile() -> str:
    return "small" if torch.cuda.is_available() else "tiny"
