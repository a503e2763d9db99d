"""Methods at the size of a profile: options, titles, and the untrained base."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import PeftConfig

import malora
from bench.errors import UserError
from bench.experiments.profiles import Profile
from malora.config import stored_value

BASE = "base"  # the method that trains nothing
TITLES = {"lora": "LoRA", "asylora": "AsyLoRA", "dora": "DoRA", "molora": "MoLoRA", "moasylora": "MoAsyLoRA",
          "malora": "MALoRA", "malora-small": "MALoRA-Small", BASE: "base, no adapter"}  # fmt: skip
PAPER_BETA = {"intra": 1.25, "procedural": 1.25}  # by mixture; elsewhere 1


def method_options(method: str, profile: Profile, mixture: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What differs from the paper's method: ranks for a small model, β for the suite, and then the changes asked for.

    Raises:
        UserError: the method has no such option, or not with such a value.
    """
    config = malora.make_config(method)
    divisor, suite = profile.rank_divisor, mixture.partition("/")[0]
    options = {}
    if divisor > 1:
        options |= {"r": config.r // divisor, "lora_alpha": config.lora_alpha // divisor}
        if getattr(config, "d", None):
            options["d"] = config.d // divisor
    if getattr(config, "down", "A_t") != "A_t" and suite in PAPER_BETA:
        options["beta"] = PAPER_BETA[suite]
    options |= {name: stored_value(name, value) for name, value in changes.items()}
    known, general = ({f.name for f in fields(of)} for of in (config, PeftConfig))
    if unknown := ", ".join(sorted(changes.keys() - known)):
        raise UserError(f"{method} has no option {unknown}; there are {', '.join(sorted(known - general))}.")
    try:
        malora.make_config(method, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{method}: {error}") from error
    return options
