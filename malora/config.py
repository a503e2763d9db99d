"""MaloraConfig: the adapter that a model gets.

Every method of the paper is a setting of this class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field, replace
from enum import Enum
from math import sqrt
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from malora.backends import BACKENDS


class MaloraPeftType(str, Enum):  # noqa: UP042  # a StrEnum is not what PEFT has
    """The type of our adapters, in the form of PEFT's own `PeftType`.

    PEFT and transformers read its `value`. Another package cannot extend PEFT's enum.
    """

    MALORA = "MALORA"


PEFT_TYPE = MaloraPeftType.MALORA
# Stands in every saved config. Without the import PEFT raises KeyError: 'MALORA', and it has no entry points.
REQUIRES = "pip install malora, and `import malora` before PEFT loads this adapter"

Down = Literal["A_t", "P_t S", "P_t S_t", "per_expert", "shared_subspace", "per_expert_subspace"]
Up = Literal["B_t", "S_B Q_t", "per_expert", "shared_subspace"]
Gating = Literal["softmax", "uniform"]

# Values of the options as the paper writes them; configs and records store these.
DOWN_FORMS = ("A_t", "P_t S", "P_t S_t")
UP_FORMS = ("B_t", "S_B Q_t")
GATINGS = ("softmax", "uniform")

# Biases of the base to train. PEFT names the adapted layers' own by the method, and LoRA's users know "lora_only".
BIASES = ("none", "all", "malora_only", "lora_only")

# Readable names for some values, by option. They are replaced when a config is made.
ALIASES: dict[str, dict[str, str]] = {
    "down": {"per_expert": "A_t", "shared_subspace": "P_t S", "per_expert_subspace": "P_t S_t"},
    "up": {"per_expert": "B_t", "shared_subspace": "S_B Q_t"},
    "backend": {"grouped": "sorted"},
}

# Cost of moving a token to an expert and back, in ranks: a dense backend could multiply the token by this many more
# ranks in the same time. The value is extrapolated from measurements on an H100: with k = 2, sparse backends lost
# up to the largest N·r measured, which was 2,048 (docs/notes/2026-11-speed.md).
DISPATCH_COST_IN_RANKS = 2048

_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass
class MaloraConfig(PeftConfig):
    """Configuration of a mixture of low-rank experts on frozen linear layers.

    A layer computes (equations 1 and 5)

        y = W x + (lora_alpha / r) Σ_t g_t(x) U_t D_t x

    with the down projection D_t and the up projection U_t of expert t, and the gate g_t. Letters are the paper's.
    Options that PEFT's `LoraConfig` has too mean the same here.

    Args:
        r: Rank of each expert (the paper's r, or r̄ for MALoRA).
        lora_alpha: Numerator of the scaling `lora_alpha / r`.
        lora_dropout: Dropout probability of the down projection's input in training. The router uses the input
            without dropout.
        target_modules: Names (or a regular expression) of the `nn.Linear` modules to adapt. By default the paper's Q,
            K, V, Up, Down and Gate, under the names that the model's type uses.
        target_parameters: Names of parameters to adapt that are no weight of a linear module, such as the fused expert
            weights of transformers' mixtures of experts ("mlp.experts.down_proj"), as in PEFT. Only for one expert,
            and without dropout. Each matrix of a fused weight has an adapter of its own.
        rank_pattern: Ranks of some modules, by name or regular expression, as in PEFT. They take the place of `r`.
        alpha_pattern: The same for `lora_alpha`.
        use_rslora: Whether the scaling is `lora_alpha / sqrt(r)` (rank-stabilized LoRA), not `lora_alpha / r`.
        exclude_modules: Names (or a regular expression) of modules to leave out.
        layers_to_transform: Indices of the decoder layers to adapt, as in PEFT. By default all.
        layers_pattern: Name of the list of decoder layers, as in PEFT.
        modules_to_save: Modules to train and save besides the adapter, as in PEFT.
        bias: Biases of the base to train and save: "none", "all", or those of adapted layers ("malora_only", or
            "lora_only"). With another value than "none" the disabled adapter is not the base.
        trainable_token_indices: Tokens whose embeddings are trained, as in PEFT.
        init_weights: Whether a new adapter starts without effect. With False the up projections start random too,
            which is for tests.
        num_experts: Number of experts, N. One expert has no router, and is LoRA.
        top_k: Number of experts per token, k. All N of them give dense softmax gates.
        gating: Source of the gates. "softmax" takes them from a router (equation 4). "uniform" gives every expert the
            gate 1 / N, without a router, and needs `top_k=num_experts`. Such an adapter can be merged.
        renormalize: Whether the gates of the chosen experts are divided by their sum, as in Mixtral. The paper's are
            not (equation 4), so their sum is well below 1.
        match_scale: Whether the scaling is divided by the mean sum of a token's gates at the start. Adapters whose
            gates have other sums then start with an equal update. Call `malora.match_gate_scale` with the first batch
            before training. Gates whose sum is always 1 need no matching.
        mean_gate_sum: That mean. `malora.match_gate_scale` sets it, and it is saved with the adapter.
        router_aux_loss_coef: Weight of the load-balancing loss (`malora.balance_loss`) in the loss that the model
            returns for labels. `outputs.aux_loss` is the balance loss without its weight. 0 leaves it out. `METHODS`
            with a router have the paper's 0.01.
        down: Form of the down projections. "per_expert" ("A_t") is a matrix per expert (equation 3).
            "shared_subspace" ("P_t S") is coefficients per expert over a subspace that all experts of the layer share
            (equations 6 and 7). "per_expert_subspace" ("P_t S_t") gives each expert a subspace of d / N dimensions.
            The paper's notation in parentheses is accepted too, and is the value that is stored.
        up: Form of the up projections. "per_expert" ("B_t") is a matrix per expert. "shared_subspace" ("S_B Q_t") is
            coefficients per expert over a shared subspace.
        d: Rank of the subspace. Required if `down` or `up` has a subspace, an error otherwise.
        beta: β of the initialization (equations 8 to 10). β < 1 gives S more of the gradient, β > 1 gives it to P_t.
        same_start: Whether all A_t start as the same random matrix (an ablation).
        freeze: Factors that are not trained: any of "A", "P", "S" (down projections) and "router".
        backend: Implementation of the expert sum. All backends except "fp8" agree up to rounding. "auto" picks
            "dense" on a CPU; on a GPU it picks "fused", or "sorted" for many and large experts (`resolve_backend`).
            "fused" computes in the dtype of the input, or that of autocast, with sums and weight gradients in float32;
            the others compute in the dtype of the adapter. "fp8" is "fused" with the frozen matmuls and the up
            projections in float8 (float8_e4m3fn, one scale per row), and changes outputs by a few percent.
            `malora.optimize_backbone` then converts the other frozen `nn.Linear` modules of the same parent too.
            "grouped" is another name of "sorted". `malora.BACKENDS` lists all.

    Raises:
        ValueError: A value is out of range, or an option has no effect together with the others.
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the scaling lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the down projection's input."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "The nn.Linear modules to adapt."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Decoder layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    num_experts: int = field(default=8, metadata={"help": "Number of experts N; one expert has no router."})
    top_k: int = field(default=2, metadata={"help": "Number of experts per token."})
    gating: Gating = field(default="softmax", metadata={"help": "Source of the gates."})
    renormalize: bool = field(default=False, metadata={"help": "Divide the chosen gates by their sum."})
    match_scale: bool = field(default=False, metadata={"help": "Divide the scaling by the mean sum of gates."})
    mean_gate_sum: float | None = field(default=None, metadata={"help": "Mean sum of gates of the first batch."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})
    down: Down = field(default="P_t S", metadata={"help": "Form of the down projections."})
    up: Up = field(default="B_t", metadata={"help": "Form of the up projections."})
    d: int | None = field(default=None, metadata={"help": "Rank of the subspace that experts share."})
    beta: float = field(default=1.0, metadata={"help": "Balance of P_t and S at initialization."})
    same_start: bool = field(default=False, metadata={"help": "Start all A_t as the same matrix."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Factors that are not trained."})
    backend: str = field(default="auto", metadata={"help": "Implementation of the expert sum."})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Ranks of some modules."})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "Alphas of some modules."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    bias: str = field(default="none", metadata={"help": "Biases of the base to train."})
    init_weights: bool = field(default=True, metadata={"help": "Start without effect on the base."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )

    requires: InitVar[str | None] = None  # of a saved config, where it is a note to whoever reads the file

    def __post_init__(self, requires: str | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's has no annotations
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # PEFT matches names against a set
        for name in ALIASES:
            setattr(self, name, stored_value(name, getattr(self, name)))
        self.freeze = sorted(self.freeze)
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_choices()
        self._check_ranges()
        self._check_subspace()
        self._check_gates()
        self.check_layers()
        self._check_nothing_is_ignored()
        if self.target_parameters is not None:
            self._check_target_parameters()

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: all options, and a note on what must be imported to load the adapter."""
        return {**super().to_dict(), "requires": REQUIRES}

    @property
    def scaling(self) -> float:
        """Factor of the experts' sum: `unmatched_scaling`, divided by `mean_gate_sum` if there is one."""
        return self.unmatched_scaling / (self.mean_gate_sum or 1)

    @property
    def unmatched_scaling(self) -> float:
        """The scaling without `match_scale`: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

        Uniform gates are a part of it, because no token is gated by itself.
        """
        scaling = self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)
        return scaling / self.num_experts if self.gating == "uniform" else scaling

    @property
    def has_router(self) -> bool:
        """True if a router picks the experts. A single expert and uniform gates need none."""
        return self.num_experts > 1 and self.gating != "uniform"

    def for_module(self, name: str) -> MaloraConfig:
        """Return the config of one module, with its own rank and alpha if a pattern matches its name."""
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        r = ranks.get(get_pattern_key([*ranks], name), self.r)
        alpha = alphas.get(get_pattern_key([*alphas], name), self.lora_alpha)
        if (r, alpha) == (self.r, self.lora_alpha):
            return self
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def factor_shapes(self, in_features: int, out_features: int, fused_experts: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the router and the factors on one linear layer, by name.

        Args:
            in_features: n.
            out_features: m.
            fused_experts: Number of matrices [m, n] in the frozen weight. Each has its own experts.
        """
        n, m, N, r = in_features, out_features, self.num_experts * fused_experts, self.r
        d = self.d or 0  # without a subspace no shape below has it
        d_own = d // self.num_experts  # of an expert with a subspace of its own
        shapes: dict[str, tuple[int, ...]] = {"router": (N, n)} if self.has_router else {}
        if self.down == "A_t":
            shapes |= {"A": (N, r, n)}
        elif self.down == "P_t S":
            shapes |= {"P": (N, r, d), "S": (d, n)}
        else:
            shapes |= {"P": (N, r, d_own), "S": (N, d_own, n)}
        return shapes | ({"B": (N, r, m)} if self.up == "B_t" else {"Q": (N, r, d), "S_B": (d, m)})

    def _check_choices(self) -> None:
        _check_choice("down", self.down, DOWN_FORMS)
        _check_choice("up", self.up, UP_FORMS)
        _check_choice("gating", self.gating, GATINGS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("bias", self.bias, BIASES)
        for name in ("use_rslora", "init_weights", "renormalize", "match_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")

    def _check_ranges(self) -> None:
        for name in ("r", "num_experts", "top_k"):
            _check_count(name, getattr(self, name))
        for module, r in (self.rank_pattern or {}).items():
            _check_count(f"rank_pattern[{module!r}]", r)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}; choose at most all.")
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must be in [0, 1).")
        _check_positive("lora_alpha", self.lora_alpha)
        for module, alpha in (self.alpha_pattern or {}).items():
            _check_positive(f"alpha_pattern[{module!r}]", alpha)
        if not (_is_number(self.router_aux_loss_coef) and self.router_aux_loss_coef >= 0):
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef!r} must be a number, at least 0; 0 leaves the "
                "load-balancing loss out."
            )
        if not (_is_number(self.beta) and self.beta > 0):
            raise ValueError(f"beta={self.beta!r} must be a positive number: S is scaled by it and P_t by its inverse.")

    def _check_subspace(self) -> None:
        if self.down == "A_t" and self.up == "B_t":
            if self.d is not None:
                raise ValueError(f"d={self.d} has no effect with down='A_t' and up='B_t'; leave it out.")
        elif not (isinstance(self.d, int) and self.d >= 1):
            raise ValueError(f"down={self.down!r}, up={self.up!r} has a subspace; give its rank as d=, not {self.d!r}.")
        elif self.down == "P_t S_t" and self.d % self.num_experts:
            raise ValueError(
                f"down='P_t S_t' gives each expert d / N dimensions, and {self.d} / {self.num_experts} is not a whole "
                "number; choose d as a multiple of num_experts."
            )

    def _check_gates(self) -> None:
        if self.gating == "uniform" and self.num_experts == 1:
            raise ValueError("gating='uniform' has no effect with one expert, whose gate is 1; leave it out.")
        if self.gating == "uniform" and self.top_k != self.num_experts:
            raise ValueError(
                f"gating='uniform' uses all experts, not top_k={self.top_k}; set top_k={self.num_experts}, which is "
                "num_experts."
            )
        is_unit = not self.has_router or self.top_k == self.num_experts
        for name in [*["renormalize"] * is_unit, *["match_scale"] * (is_unit or self.renormalize)]:
            if getattr(self, name):
                raise ValueError(f"{name}=True has no effect: a token's gates have the sum 1 already. Leave it out.")
        if self.mean_gate_sum is None:
            return
        if not self.match_scale:
            raise ValueError(f"mean_gate_sum={self.mean_gate_sum!r} needs match_scale=True; add it, or leave this out.")
        _check_positive("mean_gate_sum", self.mean_gate_sum)

    def check_layers(self) -> None:
        """Refuse choices of layers that PEFT would ignore, as its `LoraConfig` does.

        Raises:
            ValueError: `layers_to_transform` or `layers_pattern` would have no effect.
        """
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str. {self.target_modules!r} is matched "
                        f"against whole module names: write the layers {getattr(self, name)!r} into it, or give a list."
                    )
        elif self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified: "
                f"{self.layers_pattern!r} alone has no effect. Give the indices of the layers too, or leave it out."
            )

    def _check_nothing_is_ignored(self) -> None:
        if self.router_aux_loss_coef and not self.has_router:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} has no effect with "
                f"{'one expert' if self.num_experts == 1 else 'uniform gates'}, which has no router; leave it out."
            )
        if self.down == "A_t" and self.beta != 1:
            raise ValueError(f"beta={self.beta} has no effect with down='A_t'; leave it out.")
        if self.same_start and self.down != "A_t":
            raise ValueError(f"same_start=True is for down='A_t'; with down={self.down!r} it has no effect.")
        factors = ({"A"} if self.down == "A_t" else {"P", "S"}) | ({"router"} if self.has_router else set())
        if unknown := set(self.freeze) - factors:
            raise ValueError(
                f"freeze={sorted(unknown)} has no effect with these options; choose from {sorted(factors)}."
            )

    def _check_target_parameters(self) -> None:
        """Refuse options that the change of a weight cannot have, and those that PEFT does not apply to parameters."""
        if isinstance(self.target_parameters, str):
            raise TypeError(
                "`target_parameters` must be a list of strings or None. A regular expression such as "
                f"{self.target_parameters!r} is not supported; give names in a list."
            )
        self.target_parameters = list(self.target_parameters or [])
        named = f"target_parameters={self.target_parameters}"
        if not self.target_parameters:
            return
        if self.num_experts > 1:
            raise ValueError(
                f"{named} needs one expert, not num_experts={self.num_experts}: the change that a router makes depends "
                "on the token, and a parameter is the same for all tokens. Use a method without a router, such as "
                "'asylora' or PEFT's LoRA, or name linear modules in target_modules."
            )
        if self.lora_dropout:
            raise ValueError(
                f"{named} does not work with lora_dropout={self.lora_dropout}: the change of a weight has no input to "
                "drop. Set lora_dropout=0."
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} has no effect on {named}. Leave it out, and name the "
                f"layers of the parameters, such as '0.{self.target_parameters[0]}'."
            )


def stored_value(option: str, value: Any) -> Any:
    """Return the value that a config stores for an option.

    It is the paper's notation of an alias, or the value itself.
    """
    return ALIASES.get(option, {}).get(value, value) if isinstance(value, str) else value


def resolve_backend(config: MaloraConfig, device: torch.device) -> str:
    """Return the backend that a config uses on a device.

    That is the config's own backend. For "auto" it is the one that we expect to be fastest. A token costs N·r with all
    experts in one matmul, and k·(r + `DISPATCH_COST_IN_RANKS`) with sorted assignments. "auto" uses "sorted" only from
    Hopper on. On older GPUs PyTorch's grouped GEMM synchronises with the host, so a CUDA graph could not capture it.
    """
    if config.backend != "auto":
        return config.backend
    if device.type != "cuda":
        return "dense"
    is_sparse = config.num_experts * config.r > config.top_k * (config.r + DISPATCH_COST_IN_RANKS)
    return "sorted" if is_sparse and torch.cuda.get_device_properties(device).major >= 9 else "fused"


def _is_number(value: Any) -> bool:
    """Return True for a number that float32 can hold; True and False are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT32


def _check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and _is_number(value) and value >= 1):
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")


def _check_positive(name: str, value: Any) -> None:
    if not (_is_number(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a positive number.")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = (*choices, *ALIASES.get(name, ()))
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")
