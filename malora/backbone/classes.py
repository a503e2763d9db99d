"""Give single modules another class, and give them their own class back.

A module of class `LlamaMLP` becomes one of class `OptimizedLlamaMLP`, a subclass that is made at run time and has
another `forward`. So the printed model shows the change, `isinstance` holds as before, parameters and names stay, and
no other model in the process notices. A causal language model keeps the name of its class, which `save_pretrained`
writes into its config.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from malora.backbone.probe import exact_on_cpu, has_own_forward

_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}  # that were made


def _part(name: str) -> ModuleType:
    """Return the module of a part. Those for kernels need Triton, so they are imported late."""
    from malora.backbone.parts import activation, loss, norm, residual, rotary_embedding

    parts = {
        "rotary": rotary_embedding, "activation": activation, "norm": norm, "residual": residual, "loss": loss
    }  # fmt: skip
    return parts[name]


def change_class(module: nn.Module, part: str) -> bool:
    """Give a module the class that runs a part faster.

    Args:
        module: Any module. It stays as it is if it is of another kind, or if its `forward` was replaced.
        part: "rotary", "activation", "norm", "residual" or "loss".

    Returns:
        Whether the module has that class now.
    """
    if has_part(module) is not None:
        return has_part(module) == part
    if has_own_forward(module):
        return False
    with exact_on_cpu():
        settings = _part(part).settings(module)
    if settings is None:
        return False
    module.malora_settings = settings
    module.__class__ = _optimized_class(type(module), part)
    return True


def has_part(module: nn.Module) -> str | None:
    """Return the part that a module's class runs faster, or None if it has its own class."""
    part: str | None = getattr(type(module), "malora_part", None)
    return part


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    if "malora_part" in vars(type(module)):  # not a class that somebody else has made of ours
        module.__class__ = type(module).__bases__[0]
        del module.malora_settings


def _optimized_class(base: type[nn.Module], part: str) -> type[nn.Module]:
    """Return the subclass of a class that runs a part faster."""
    if (base, part) not in _CLASSES:
        namespace = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "malora_part": part,
            "forward": _part(part).make_forward(base),
        }
        name = f"Optimized{base.__name__}"
        if part == "loss":
            name = base.__name__
            namespace["extra_repr"] = _describe_loss
        made: Any = type(base)
        _CLASSES[base, part] = made(name, (base,), namespace)
    return _CLASSES[base, part]


def _describe_loss(self: nn.Module) -> str:
    return "loss without logits in training"


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle and copy by the module's own class; nobody finds one that was made at run time by its name."""
    own, part = type(self), type(self).malora_part
    _, _, *state = super(own, self).__reduce_ex__(protocol)
    return (_new_instance, (own.__bases__[0], part), *state)


def _new_instance(base: type[nn.Module], part: str) -> nn.Module:
    made: Any = _optimized_class(base, part)
    instance: nn.Module = made.__new__(made)
    return instance
