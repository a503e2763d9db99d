"""Methods at the size of a profile: options, titles, and the untrained base."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import PeftConfig

import malora
from bench.errors import UserError, unknown_name
from bench.experiments.profiles import Profile
from malora.config import stored_value

BASE = "base"  # the method that trains nothing
ELSEWHERE = "elsewhere-"  # begins the method of an adapter that was trained elsewhere and is only scored
MAX_DETAILS = 1000  # characters of an error, which may hold a value that the user gave
TITLES = {
    "lora": "LoRA",
    "asylora": "AsyLoRA",
    "dora": "DoRA",
    "molora": "MoLoRA",
    "moasylora": "MoAsyLoRA",
    "malora": "MALoRA",
    "malora-small": "MALoRA-Small",
    "molora-renormalized": "MoLoRA, gates renormalised",
    "malora-renormalized": "MALoRA, gates renormalised",
    BASE: "base, no adapter",
}
PAPER_BETA = {"intra": 1.25, "procedural": 1.25}  # β by mixture; the paper has 1 for all others


def title_of(method: str) -> str:
    """Return the title of a method in tables."""
    if method.startswith(ELSEWHERE):
        return f"{method.removeprefix(ELSEWHERE)}, trained elsewhere"
    return TITLES.get(method, method)


def method_options(method: str, profile: Profile, mixture: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method that differ from its defaults in METHODS.

    Ranks are divided by the profile's `rank_divisor`, and β is the paper's for the mixture.

    Args:
        method: A name in METHODS.
        profile: Size of the experiment.
        mixture: Name of the mixture to train on.
        changes: Options that the user asked for. They override the others.

    Raises:
        UserError: The method has no such option, or not with this value.
    """
    config = malora.make_config(method)
    usual = vars(config)
    divisor, suite = profile.rank_divisor, mixture.partition("/")[0]
    options: dict[str, Any] = {}
    if divisor > 1:
        options |= {"r": usual["r"] // divisor, "lora_alpha": usual["lora_alpha"] // divisor}
        if usual.get("d"):
            options["d"] = usual["d"] // divisor
    if usual.get("down", "A_t") != "A_t" and suite in PAPER_BETA:
        options["beta"] = PAPER_BETA[suite]
    options |= {name: stored_value(name, value) for name, value in changes.items()}
    known, general = ({f.name for f in fields(of)} for of in (config, PeftConfig))
    for name in sorted(changes.keys() - known):
        raise UserError(f"{method}: {unknown_name('option', name, sorted(known - general))}.")
    if "router_aux_loss_coef" in changes:
        raise UserError(
            "router_aux_loss_coef has no effect in the benchmark: the weight of the balance loss is the profile's "
            f"balance_factor, {profile.balance_factor} in {profile.name}."
        )
    try:
        malora.make_config(method, **options)
    except Exception as error:  # PEFT checks few values, and passes on any exception that another causes
        problem = error if isinstance(error, TypeError | ValueError) else repr(error)
        raise UserError(f"{method}: {' '.join(str(problem).split())[:MAX_DETAILS]}") from error
    return options
