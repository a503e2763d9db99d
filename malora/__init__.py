"""MALoRA (arXiv 2410.22782) and its rivals as PEFT adapters.

Importing this package registers the tuner with PEFT; from then on `get_peft_model`, `save_pretrained` and
`PeftModel.from_pretrained` know it.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from malora.backbone import optimize_backbone, restore_backbone
from malora.backends import BACKENDS
from malora.config import PEFT_TYPE, MaloraConfig
from malora.layer import PREFIX, MaloraLayer
from malora.load_balancing import RouterStats, balance_loss, has_router, router_stats
from malora.methods import METHODS
from malora.model import TARGET_MODULES, MaloraModel
from malora.weight_cache import WeightCache, release_caches

# PEFT's own `register_peft_method` accepts members of its PeftType enum only, which another package cannot extend.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MaloraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MaloraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "METHODS",
    "TARGET_MODULES",
    "MaloraConfig",
    "MaloraLayer",
    "MaloraModel",
    "RouterStats",
    "WeightCache",
    "balance_loss",
    "has_router",
    "optimize_backbone",
    "release_caches",
    "restore_backbone",
    "router_stats",
]
