"""Types of the options that METHODS take, so a type checker finds a typo in one.

Each class lists the arguments of a config class. A test compares them with the classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack

from peft import LoraConfig, TaskType

from malora.config import Down, Gating, MaloraConfig, Up

if TYPE_CHECKING:
    from peft.tuners.lora.config import (
        ArrowConfig,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoftQConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        MontecloraConfig,
        VeloraConfig,
    )


class CommonOptions(TypedDict, total=False):
    """Options that all methods take. They mean the same in both config classes."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: list[str] | str | None
    target_parameters: list[str] | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, int] | None
    use_rslora: bool
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    task_type: str | TaskType | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool


class MaloraOptions(CommonOptions, total=False):
    """Options of `MaloraConfig`, which documents them."""

    num_experts: int
    top_k: int
    gating: Gating
    renormalize: bool
    match_scale: bool
    mean_gate_sum: float | None
    router_aux_loss_coef: float
    down: Down
    up: Up
    d: int | None
    beta: float
    same_start: bool
    freeze: list[str]
    backend: str
    bias: Literal["none", "all", "malora_only", "lora_only"]
    init_weights: bool


class LoraOptions(CommonOptions, total=False):
    """Options of PEFT's `LoraConfig`, which documents them."""

    fan_in_fan_out: bool
    bias: Literal["none", "all", "lora_only"]
    use_dora: bool
    init_lora_weights: bool | str
    megatron_config: dict[str, Any] | None
    megatron_core: str | None
    loftq_config: LoftQConfig | dict[str, Any]
    eva_config: EvaConfig | None
    corda_config: CordaConfig | None
    lora_ga_config: LoraGAConfig | None
    velora_config: VeloraConfig | dict[str, Any] | None
    alora_invocation_tokens: list[int] | None
    use_qalora: bool
    qalora_group_size: int
    monteclora_config: MontecloraConfig | None
    layer_replication: list[tuple[int, int]] | None
    runtime_config: LoraRuntimeConfig
    lora_bias: bool
    use_bdlora: BdLoraConfig | None
    arrow_config: ArrowConfig | None
    kasa_config: KasaConfig | None
    ensure_weight_tying: bool


class MaloraMethod(Protocol):
    """Method that makes a `MaloraConfig`."""

    def __call__(self, **options: Unpack[MaloraOptions]) -> MaloraConfig:
        """Make a config with the method's settings, changed by the options."""
        ...


class LoraMethod(Protocol):
    """Method that makes a `LoraConfig` of PEFT."""

    def __call__(self, **options: Unpack[LoraOptions]) -> LoraConfig:
        """Make a config with the method's settings, changed by the options."""
        ...
