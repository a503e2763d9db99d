"""MALoRA (arXiv 2410.22782) and the methods it is compared with, as PEFT adapters.

Pick a method by name; everything else is PEFT as usual:

    from peft import get_peft_model
    import malora

    model = get_peft_model(model, malora.METHODS["malora"](beta=1.25))
    loss = model(**batch).loss  # with the routers' load-balancing loss in it
    model.save_pretrained("adapter")

Importing the package registers the adapters with PEFT, so `PeftModel.from_pretrained` can load them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from malora.adapter_layer import PREFIX
from malora.backbone import (
    CapturedStep,
    capture_step,
    checkpointing_mode,
    optimize_backbone,
    restore_backbone,
    set_checkpointing,
)
from malora.backends import BACKENDS
from malora.config import PEFT_TYPE, MaloraConfig
from malora.gate_scale import match_gate_scale
from malora.layer import MaloraLayer, MaloraLinear
from malora.load_balancing import RouterStats, balance_loss, has_router, router_stats
from malora.methods import METHODS, make_config
from malora.model import MaloraModel
from malora.parameter_groups import parameter_groups
from malora.targets import TARGET_MODULES
from malora.weight_cache import WeightCache, release_caches

# PEFT's `register_peft_method` accepts members of its PeftType enum only, and another package cannot extend an enum.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MaloraConfig  # type: ignore[index]  # the key is a member of our own enum
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MaloraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX  # type: ignore[index]

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "METHODS",
    "TARGET_MODULES",
    "CaptureMixin",
    "CapturedStep",
    "MaloraConfig",
    "MaloraLayer",
    "MaloraLinear",
    "MaloraModel",
    "RouterCallback",
    "RouterStats",
    "WeightCache",
    "balance_loss",
    "capture_step",
    "checkpointing_mode",
    "has_router",
    "make_config",
    "match_gate_scale",
    "optimize_backbone",
    "parameter_groups",
    "release_caches",
    "restore_backbone",
    "router_stats",
    "set_checkpointing",
]

if TYPE_CHECKING:
    from malora.capture_mixin import CaptureMixin
    from malora.router_callback import RouterCallback
else:  # a type checker would take it as a reason to accept every name

    def __getattr__(name: str) -> Any:
        """Import what is rarely needed, or return an object under its former name with a warning."""
        if name == "RouterCallback":
            from malora.router_callback import RouterCallback  # loads transformers' Trainer, which takes a while

            return RouterCallback
        if name == "CaptureMixin":
            from malora.capture_mixin import CaptureMixin  # the same

            return CaptureMixin
        if name == "HeldWeights":
            warnings.warn(
                "malora.HeldWeights is now malora.WeightCache; the old name goes in the next version.",
                DeprecationWarning,
                stacklevel=2,
            )
            return WeightCache
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
