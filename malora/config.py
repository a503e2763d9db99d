"""MaloraConfig: which of the paper's adapters a model gets. Every method of the paper is a setting of this class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from malora.config import MaloraConfig
from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from malora.backends import BACKENDS

# What carrying a token to an expert and back costs, in ranks that it could be multiplied by meanwhile. On an H100,
# sparse work was behind up to the largest N·r tried, 2,048 with k = 2; this is where both would meet (docs/speed.md).
RANKS_TO_CARRY = 2048


def choose(config: MaloraConfig, device: torch.device) -> str:
    """The backend that a config means: its own, or for "auto" the one expected to be fastest on the device.

    Side by side, experts cost N·r a token; sorted, k·r and the carrying, `RANKS_TO_CARRY`. A CPU stays dense. GPUs
    before Hopper stay fused: torch's grouped product waits for the host there, so a CUDA graph could not hold it.
    """
    if config.backend != "auto":
        return config.backend
    if device.type != "cuda":
        return "dense"
    is_sparse = config.num_experts * config.r > config.top_k * (config.r + RANKS_TO_CARRY)
    return "sorted" if is_sparse and torch.cuda.get_device_properties(device).major >= 9 else "fused"


PEFT_TYPE = "MALORA"
DOWN_SIDES = ("A_t", "P_t S", "P_t S_t")
UP_SIDES = ("B_t", "S_B Q_t")


@dataclass
class MaloraConfig(PeftConfig):
    """Configuration of a mixture of low-rank experts on frozen linear maps.

    A layer computes `y = W x + (lora_alpha / r) Σ_t g_t(x) U_t D_t x` (eq. 1, 5), with D_t the down side and U_t
    the up side of expert t. Letters are the paper's; names that PEFT's LoRA has too mean the same here.

    Args:
        r: rank of each expert (the paper's r, or r̄ for MALoRA).
        lora_alpha: numerator of the scaling `lora_alpha / r`.
        lora_dropout: probability of dropping an input of the down side in training. The router sees all inputs.
        target_modules: names (or a regular expression) of the `nn.Linear` modules to adapt. None takes the
            paper's Q, K, V, Up, Down, Gate under the names that the model's type uses.
        exclude_modules: names (or a regular expression) to leave out.
        layers_to_transform, layers_pattern: adapt these decoder layers only, as in PEFT.
        modules_to_save: modules besides the adapter to train and save, as in PEFT.
        num_experts: N. One expert has no router, and is LoRA.
        top_k: k, how many experts serve a token. Their gates are not renormalised (eq. 4).
        down: "A_t" a matrix an expert (eq. 3); "P_t S" coefficients over a subspace that the layer's experts share
            (eq. 6, 7); "P_t S_t" the same with a subspace of d / N an expert.
        up: "B_t" a matrix an expert, or "S_B Q_t" coefficients over a shared subspace.
        d: rank of the subspace; only where a side has one.
        beta: β of the initialisation (eq. 8 to 10): moves gradient from S (β < 1) to P_t (β > 1).
        same_start: every A_t starts as the same random matrix (an ablation).
        freeze: what stays as it starts: down-side factors, of "A", "P", "S", and "router".
        backend: how the sum over experts is computed; any of `malora.BACKENDS` but "fp8" gives the same result within
            rounding. "auto" is "dense" on a CPU, and on a GPU "fused", or "sorted" where experts are so many and
            wide that it should be faster (`malora.backends.choose`). The fused one computes in the dtype of the input,
            or autocast's, with sums and weight gradients in float32; the others in the adapter's dtype. "fp8" is the
            fused one whose products with frozen weights, and the up sides with them, round their factors to 8 bits
            (float8_e4m3fn, a scale for each row), as does every other frozen `nn.Linear` of the same parent, such as
            attention's outputs. That changes the result by a few percent of it.

    Raises:
        ValueError: a value out of range, or an option that the other options leave without effect.
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the scaling lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the down side's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "The nn.Linear modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Decoder layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    num_experts: int = field(default=8, metadata={"help": "Number of experts N; one expert has no router."})
    top_k: int = field(default=2, metadata={"help": "Experts that serve a token."})
    down: Literal["A_t", "P_t S", "P_t S_t"] = field(default="P_t S", metadata={"help": "Form of the down side."})
    up: Literal["B_t", "S_B Q_t"] = field(default="B_t", metadata={"help": "Form of the up side."})
    d: int | None = field(default=None, metadata={"help": "Rank of the subspace that experts share."})
    beta: float = field(default=1.0, metadata={"help": "Balance of P_t and S at the start."})
    same_start: bool = field(default=False, metadata={"help": "All A_t start alike."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "What is not trained."})
    backend: str = field(default="auto", metadata={"help": "How the sum over experts is computed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # PEFT matches names against a set
        self.freeze = sorted(self.freeze)
        self._check_values()
        self._check_nothing_is_ignored()

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    @property
    def has_router(self) -> bool:
        return self.num_experts > 1

    def _check_values(self) -> None:
        _choose("down", self.down, DOWN_SIDES)
        _choose("up", self.up, UP_SIDES)
        _choose("backend", self.backend, BACKENDS)
        for name in ("r", "num_experts", "top_k"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number from 1.")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}; choose at most all.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1).")
        if not (isinstance(self.lora_alpha, int | float) and self.lora_alpha > 0):
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a positive number.")
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be positive: S is scaled by it and P_t by its inverse.")

    def _check_nothing_is_ignored(self) -> None:
        has_subspace = self.down != "A_t" or self.up == "S_B Q_t"
        if has_subspace and not (isinstance(self.d, int) and self.d >= 1):
            raise ValueError(f"down={self.down!r}, up={self.up!r} has a subspace; give its rank as d=, not {self.d!r}.")
        if not has_subspace and self.d is not None:
            raise ValueError(f"d={self.d} has no effect with down='A_t' and up='B_t'; leave it out.")
        if self.down == "P_t S_t" and self.d % self.num_experts:
            raise ValueError(f"down='P_t S_t' gives each expert d / N dimensions: {self.d} / {self.num_experts}.")
        if self.down == "A_t" and self.beta != 1:
            raise ValueError(f"beta={self.beta} has no effect with down='A_t'; leave it out.")
        if self.same_start and self.down != "A_t":
            raise ValueError(f"same_start=True is for down='A_t', not {self.down!r}, whose experts share S as it is.")
        parts = ({"A"} if self.down == "A_t" else {"P", "S"}) | ({"router"} if self.has_router else set())
        if unknown := set(self.freeze) - parts:
            raise ValueError(f"freeze={sorted(unknown)}: there is {sorted(parts)} to freeze here.")


def _choose(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")
