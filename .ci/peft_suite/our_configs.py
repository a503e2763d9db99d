"""Our configs, in the form of the tables that parametrise PEFT's tests."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
from peft import LoraConfig

from malora.config import Down, MaloraConfig

# Methods by name. PEFT's custom models have as few as 10 inputs, so the subspaces are small.
METHODS: dict[str, dict[str, Any]] = {
    "malora": {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k": 2, "down": "P_t S", "d": 6},
    "molora": {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k": 2, "down": "A_t"},
    "asylora": {"r": 4, "lora_alpha": 8, "num_experts": 1, "top_k": 1, "down": "A_t", "freeze": ["A"]},
    "one-expert": {"r": 4, "lora_alpha": 8, "num_experts": 1, "top_k": 1, "down": "A_t"},
}
MORE_METHODS: dict[str, dict[str, Any]] = {
    "unshared-s": {**METHODS["malora"], "down": "P_t S_t", "d": 8},
    "frozen-p": {**METHODS["malora"], "freeze": ["P"]},
    "fixed-s": {**METHODS["malora"], "freeze": ["S"]},
    "decomposed-b": {**METHODS["molora"], "up": "S_B Q_t", "d": 6},
    "malora-sorted": {**METHODS["malora"], "backend": "sorted"},
    "one-subspace": {**METHODS["one-expert"], "down": "P_t S", "d": 6},
}

# Targets in PEFT's custom models, by the name of the model.
TARGETS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lin0", "MLP", {"target_modules": "lin0"}),
    ("[lin1]", "MLP", {"target_modules": ["lin1"]}),
    ("[lin0,lin1]", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("saved", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("dropout", "MLP", {"target_modules": ["lin0"], "lora_dropout": 0.1}),
)
MORE_TARGETS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("[lin0]", "MLP", {"target_modules": ["lin0"]}),
    ("norms", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    ("two", "MLP2", {"target_modules": ["lin0", "lin1"]}),
)

# Targets in models with fused experts: a name, the modules and the parameters.
PARAMETERS: tuple[tuple[str, list[str] | None, list[str]], ...] = (
    ("down", [], ["experts.down_proj"]),
    ("apart", [], ["0.{}.experts.gate_up_proj", "1.{}.experts.down_proj"]),
    ("both", None, ["experts.down_proj", "experts.gate_up_proj"]),
    ("modules", ["q_proj", "v_proj"], ["experts.down_proj"]),
)
# Name of the module that holds the experts, by model.
PARENTS_OF_EXPERTS = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": "feed_forward",
    "trl-internal-testing/tiny-GptOssForCausalLM": "mlp",
}


@dataclass
class OneExpert(MaloraConfig):
    """Config whose defaults are one expert, for tests that give no options."""

    num_experts: int = 1
    top_k: int = 1
    down: Down = "A_t"


@dataclass
class Malora(MaloraConfig):
    """Config whose defaults are MALoRA with a small subspace, for tests that give no options."""

    num_experts: int = 4
    d: int | None = 6


CLASSES = [pytest.param(Malora, id="malora"), pytest.param(OneExpert, id="one-expert")]
CONFIGS = [pytest.param(Malora(), id="malora"), pytest.param(OneExpert(), id="one-expert")]


class LoraLike:
    """Stand-in for `LoraConfig` in tests that make one: a `OneExpert` with the same options."""

    def __new__(cls, **options: Any) -> MaloraConfig:  # type: ignore[misc]  # tests only call it
        """Make the config."""
        initialize = options.pop("init_lora_weights", True)
        if options.get("bias") == "none":
            del options["bias"]
        if initialize is not True:
            options["init_weights"] = initialize
        return OneExpert(**options)


def like_lora(config: LoraConfig) -> MaloraConfig:
    """Return one of our configs with the options that a `LoraConfig` has changed."""
    default = LoraConfig()
    names = [f.name for f in fields(LoraConfig) if f.init and getattr(config, f.name) != getattr(default, f.name)]
    return LoraLike(**{name: getattr(config, name) for name in names})  # type: ignore[return-value]  # see __new__


def tables(is_all: bool) -> dict[str, dict[str, list[Any]]]:
    """Return the rows of each table, by test module and name of the table.

    Args:
        is_all: Whether to take every method and target, instead of the ones that tell most.
    """
    methods = METHODS | (MORE_METHODS if is_all else {})
    few = methods if is_all else {name: METHODS[name] for name in ("malora", "one-expert")}
    targets = TARGETS + (MORE_TARGETS if is_all else ())

    def models(task: str | None = None) -> list[Any]:
        settings = {"target_modules": None, "lora_dropout": 0.05} | ({"task_type": task} if task else {})
        return [pytest.param(MaloraConfig, {**settings, **options}, id=name) for name, options in few.items()]

    custom = [
        pytest.param(
            f"{method} {target}", model, MaloraConfig, {**options, **settings, "lora_alpha": 1}, id=f"{method}-{target}"
        )
        for method, options in methods.items()
        for target, model, settings in targets
    ]
    initialized = {"init_weights": False} if "init_weights" in {f.name for f in fields(MaloraConfig)} else {}
    two_adapters = [
        pytest.param(
            name, "malora", MaloraConfig, {**options, **initialized, "target_modules": ["lin0"]},
            {**options, **initialized, "target_modules": [second]}, id=f"{name}-lin0-{second}",
        )
        for name, options in methods.items()
        for second in ("lin0", "lin1")
    ]  # fmt: skip
    parameters = [
        pytest.param(
            model,
            MaloraConfig,
            {**options, "target_modules": modules, "target_parameters": [name.format(parent) for name in names]},
            id=f"{method}-{targets}-{parent}",
        )
        for method, options in methods.items()
        if options["num_experts"] == 1 and (is_all or method == "one-expert")
        for model, parent in PARENTS_OF_EXPERTS.items()
        for targets, modules, names in PARAMETERS
    ]
    configs = [
        pytest.param(MaloraConfig, {"d": 6}, id="malora"),
        pytest.param(MaloraConfig, METHODS["asylora"], id="asylora"),
    ]
    return {
        "test_custom_models": {
            "TEST_CASES": custom,
            "ALL_PEFT_CONFIG_CLASSES": CLASSES,
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": two_adapters,
        },
        "test_decoder_models": {"ALL_CONFIGS": models("CAUSAL_LM")},
        "test_encoder_decoder_models": {"ALL_CONFIGS": models("SEQ_2_SEQ_LM")},
        "test_feature_extraction_models": {"ALL_CONFIGS": models("FEATURE_EXTRACTION")},
        "test_seq_classifier": {"ALL_CONFIGS": models("SEQ_CLS")},
        "test_config": {"ALL_CONFIG_CLASSES": configs, "LAYER_INDEXING_CONFIG_CLASSES": configs},
        "test_low_level_api": {},
        "test_target_parameters": {"ALL_CONFIGS": parameters},
    }
