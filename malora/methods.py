"""METHODS: the adapters that are compared, by name. The one place to add a method.

Each entry makes a PEFT config with the paper's settings; keyword arguments override them:

    from peft import get_peft_model
    import malora

    model = get_peft_model(model, malora.METHODS["malora"](beta=1.25))

Sizes are those of the paper at LLaMA-2 7B (sections 3 and 4, Table 3), where all methods have about as many trainable
parameters. All scale their update by lora_alpha / r = 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peft import LoraConfig, PeftConfig

from malora.config import MaloraConfig
from malora.model import TARGET_MODULES

_COMMON = {"lora_dropout": 0.05, "task_type": "CAUSAL_LM"}

# PEFT would put its own LoRA on Q and V only. Compared are the same targets for all.
_lora = partial(LoraConfig, **_COMMON, r=64, lora_alpha=128, target_modules=TARGET_MODULES["llama"])
_one_expert = partial(MaloraConfig, **_COMMON, num_experts=1, top_k=1, down="A_t")
_molora = partial(MaloraConfig, **_COMMON, num_experts=8, top_k=2, down="A_t")
_malora = partial(MaloraConfig, **_COMMON, num_experts=8, top_k=2, down="P_t S", r=12, lora_alpha=24, d=32)

METHODS: dict[str, Callable[..., PeftConfig]] = {
    # Table 1 and 2
    "lora": _lora,
    "dora": partial(_lora, use_dora=True),
    "asylora": partial(_one_expert, r=128, lora_alpha=256, freeze=["A"]),
    "molora": partial(_molora, r=8, lora_alpha=16),
    "moasylora": partial(_molora, r=16, lora_alpha=32, freeze=["A"]),
    "malora": _malora,
    "malora-small": partial(_malora, r=8, lora_alpha=16, d=22),
    # Table 3
    "molora-r12": partial(_molora, r=12, lora_alpha=24),
    "molora-same-a": partial(_molora, r=12, lora_alpha=24, same_start=True),
    "malora-fixed-s": partial(_malora, r=16, lora_alpha=32, freeze=["S"]),
    "malora-symmetric": partial(_malora, r=8, lora_alpha=16, d=64),
    "malora-unshared-s": partial(_malora, down="P_t S_t"),
    "malora-frozen-p": partial(_malora, freeze=["P"]),
    "malora-decomposed-b": partial(_malora, down="A_t", up="S_B Q_t"),
}
