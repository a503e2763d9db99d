"""METHODS: the adapters that are compared, by name. The one place to add a method.

Each entry makes a PEFT config with the paper's settings. Keyword arguments override them:

    from peft import get_peft_model
    import malora

    model = get_peft_model(model, malora.METHODS["malora"](beta=1.25))

The sizes are the paper's for LLaMA-2 7B (sections 3 and 4, Table 3). There all methods have about the same number of
trainable parameters. Every method scales its update by lora_alpha / r = 2.

To add a method, add an entry to METHODS and its name to `Methods`. The tests then run for it too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypedDict, TypeVar, cast

from peft import LoraConfig, PeftConfig

from malora.config import MaloraConfig
from malora.method_options import LoraMethod, MaloraMethod
from malora.targets import ALL_PAPER_TARGETS

Config = TypeVar("Config", bound=PeftConfig)

Methods = TypedDict(
    "Methods",
    {
        "lora": LoraMethod,
        "dora": LoraMethod,
        "asylora": MaloraMethod,
        "molora": MaloraMethod,
        "moasylora": MaloraMethod,
        "malora": MaloraMethod,
        "malora-small": MaloraMethod,
        "molora-r12": MaloraMethod,
        "molora-same-a": MaloraMethod,
        "malora-fixed-s": MaloraMethod,
        "malora-symmetric": MaloraMethod,
        "malora-unshared-s": MaloraMethod,
        "malora-frozen-p": MaloraMethod,
        "malora-decomposed-b": MaloraMethod,
        "molora-renormalized": MaloraMethod,
        "malora-renormalized": MaloraMethod,
    },
)


@dataclass(frozen=True)
class _Preset(Generic[Config]):
    """Config class with the settings of one method."""

    config_class: type[Config]
    settings: dict[str, Any]

    def __call__(self, **options: Any) -> Config:
        """Make a config with the method's settings, changed by the options.

        Raises:
            TypeError: The config has no option of this name.
            ValueError: A value is out of range, or an option has no effect together with the others.
        """
        known = sorted(field.name for field in fields(self.config_class) if field.init)
        for option in options:
            if option in _ONLY_LORA and option not in known:
                raise TypeError(f"{self.config_class.__name__} has no option {option!r}: {_ONLY_LORA[option]}.")
            if option not in known:
                raise TypeError(f"{self.config_class.__name__} has no option {_suggest(option, known)}")
        settings = self.settings
        has_no_router = options.get("num_experts") == 1 or options.get("gating") == "uniform"
        if has_no_router:  # nothing to balance; a weight that the user gives is an error
            settings = {name: value for name, value in settings.items() if name != "router_aux_loss_coef"}
        return self.config_class(**settings | options)

    def with_settings(self, **changes: Any) -> _Preset[Config]:
        """Return a preset with these settings changed."""
        return replace(self, settings=self.settings | changes)


_ANOTHER_METHOD = "it makes another method of PEFT's LoRA; use LoraConfig for it"

# Options of PEFT's LoraConfig that MaloraConfig has not, with the reason and the way out.
_ONLY_LORA: dict[str, str] = {
    **{field.name: _ANOTHER_METHOD for field in fields(LoraConfig) if field.init},
    "fan_in_fan_out": "the layout of a weight follows from its module, an nn.Linear or a Conv1D; leave it out",
    "init_lora_weights": "use init_weights=False to start with an effect; other initializations are LoRA's",
    "layer_replication": "replicate the layers of the base model before",
    "ensure_weight_tying": "trainable_token_indices keeps tied embeddings tied, and modules_to_save cannot",
    "lora_bias": "an expert has no bias; use bias='malora_only' to train those of the adapted layers",
}

_COMMON = {"lora_dropout": 0.05, "task_type": "CAUSAL_LM"}

# By default PEFT puts LoRA on Q and V only. For a fair comparison all methods adapt the same modules.
_LORA = _Preset(LoraConfig, {**_COMMON, "r": 64, "lora_alpha": 128, "target_modules": ALL_PAPER_TARGETS})
_ONE_EXPERT = _Preset(MaloraConfig, {**_COMMON, "num_experts": 1, "top_k": 1, "down": "A_t"})
# The paper's tables have 0.01 as the weight of the balance loss, its text 0.001.
_ROUTED = {**_COMMON, "num_experts": 8, "top_k": 2, "router_aux_loss_coef": 0.01}
_MOLORA = _Preset(MaloraConfig, {**_ROUTED, "down": "A_t"})
_MALORA = _Preset(MaloraConfig, {**_ROUTED, "down": "P_t S", "r": 12, "lora_alpha": 24, "d": 32})

METHODS: Methods = {
    # Tables 1 and 2
    "lora": _LORA,
    "dora": _LORA.with_settings(use_dora=True),
    "asylora": _ONE_EXPERT.with_settings(r=128, lora_alpha=256, freeze=["A"]),
    "molora": _MOLORA.with_settings(r=8, lora_alpha=16),
    "moasylora": _MOLORA.with_settings(r=16, lora_alpha=32, freeze=["A"]),
    "malora": _MALORA,
    "malora-small": _MALORA.with_settings(r=8, lora_alpha=16, d=22),
    # Table 3
    "molora-r12": _MOLORA.with_settings(r=12, lora_alpha=24),
    "molora-same-a": _MOLORA.with_settings(r=12, lora_alpha=24, same_start=True),
    "malora-fixed-s": _MALORA.with_settings(r=16, lora_alpha=32, freeze=["S"]),
    "malora-symmetric": _MALORA.with_settings(r=8, lora_alpha=16, d=64),
    "malora-unshared-s": _MALORA.with_settings(down="P_t S_t"),
    "malora-frozen-p": _MALORA.with_settings(freeze=["P"]),
    "malora-decomposed-b": _MALORA.with_settings(down="A_t", up="S_B Q_t"),
    # Not in the paper: gates with the sum 1, as in most other mixtures of LoRA experts
    "molora-renormalized": _MOLORA.with_settings(r=8, lora_alpha=16, renormalize=True),
    "malora-renormalized": _MALORA.with_settings(renormalize=True),
}


def make_config(method: str, **options: Any) -> LoraConfig | MaloraConfig:
    """Make the config of a method whose name is known only at run time.

    A type checker cannot check the options here. If the name is a literal, use `METHODS[name](**options)`.

    Raises:
        TypeError: The method has no option of this name.
        ValueError: There is no such method, a value is out of range, or an option has no effect.
    """
    methods = cast("dict[str, LoraMethod | MaloraMethod]", METHODS)  # a TypedDict takes literal keys only
    if method not in methods:
        raise ValueError(f"there is no method {_suggest(method, methods)}")
    return methods[method](**options)


def _suggest(unknown: str, choices: Iterable[str]) -> str:
    """Return the end of an error message: unknown name, nearest choice, all choices."""
    (nearest,) = difflib.get_close_matches(unknown, choices, n=1, cutoff=0)
    return f"{unknown!r}; did you mean {nearest!r}? Choose from {', '.join(choices)}."
