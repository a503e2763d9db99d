"""Parameter groups for an optimizer: learning rates of routers and of up projections."""

from __future__ import annotations

from typing import Any

from torch import nn

# Names of parameters, without the name of their adapter: of MaloraLayer, and of PEFT's LoRA.
ROUTERS = frozenset({"malora_router"})
UP_PROJECTIONS = frozenset({"malora_B", "malora_Q", "malora_S_B", "lora_B", "lora_embedding_B"})


def parameter_groups(
    model: nn.Module, lr: float, *, router_lr: float | None = None, lora_plus_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Return groups of a model's trainable parameters with a learning rate each.

        optimizer = torch.optim.AdamW(malora.parameter_groups(model, 1e-4, router_lr=1e-3), weight_decay=0.0)

    It works for `MaloraConfig` and for PEFT's LoRA. Frozen parameters are left out. Set the weight decay in the
    optimizer, or add it to a group.

    Args:
        model: Model with an adapter.
        lr: Learning rate of everything that has no other.
        router_lr: Learning rate of the routers.
        lora_plus_ratio: Learning rate of the up projections divided by `lr`. LoRA+ (arXiv 2402.12354) trains B faster
            than A; it recommends 16. Up projections are B, or Q and S_B.

    Returns:
        Dictionaries with "params", "lr" and a "name": "adapter", "up_projection" or "router". Groups without parameters
        are left out. Other trained modules, such as `modules_to_save`, are in "adapter".

    Raises:
        ValueError: A learning rate or a ratio is not positive, or has no effect because nothing that it is for is
            trained.
    """
    rates = {
        "adapter": lr,
        "up_projection": lr if lora_plus_ratio is None else lr * lora_plus_ratio,
        "router": lr if router_lr is None else router_lr,
    }
    for name, value in (("lr", lr), ("router_lr", router_lr), ("lora_plus_ratio", lora_plus_ratio)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be positive.")
    by_name: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_name[_group_of(name)].append(parameter)
    if router_lr is not None and not by_name["router"]:
        raise ValueError(f"router_lr={router_lr} has no effect: no router of this model is trained; leave it out.")
    if lora_plus_ratio is not None and not by_name["up_projection"]:
        raise ValueError(
            f"lora_plus_ratio={lora_plus_ratio} has no effect: no up projection of this model is trained; leave it out."
        )
    return [{"params": found, "lr": rates[name], "name": name} for name, found in by_name.items() if found]


def _group_of(parameter: str) -> str:
    parts = set(parameter.split("."))
    if parts & ROUTERS:
        return "router"
    return "up_projection" if parts & UP_PROJECTIONS else "adapter"
