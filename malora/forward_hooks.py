"""Hooks that surround every forward pass of a base model with adapted layers.

They are on the base model, because the tuner's own `forward` does not run in every pass. With
`peft.inject_adapter_in_model` there is no tuner, and a `PeftModel` without a task type calls the base model directly.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from malora.fused.group import ProjectionGroup, drop_prefetched, prefetch_packed_weights
from malora.layer import MaloraLayer
from malora.routing import RoutingLog

if TYPE_CHECKING:
    from malora.fused.weight_cache import GroupAdapter


class ForwardHooks:
    """The hooks of one base model, and the state that they keep.

    Before a pass they start the routing log and pack the weights of the fused layers.

    Attributes:
        log: Routing of the model's last forward pass.
    """

    def __init__(self) -> None:
        self.log = RoutingLog()
        self._handles: list[RemovableHandle] = []
        self._groups: list[ProjectionGroup] | None = None
        self._prefetched: list[GroupAdapter] = []
        self._depth = 0  # a model may call itself

    @classmethod
    def on(cls, model: nn.Module) -> ForwardHooks:
        """Return the hooks of a base model. They are registered in the first call."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), cls):
                return owner
        hooks = cls()
        hooks._handles = [
            model.register_forward_pre_hook(hooks._before, with_kwargs=True),
            model.register_forward_hook(hooks._after, with_kwargs=True, always_call=True),
        ]
        return hooks

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def forget_layers(self) -> None:
        """Look for the adapted layers again in the next pass, because some were added or removed."""
        self._groups = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        mask = _argument("attention_mask", model, args, kwargs)
        is_padding_mask = mask is not None and mask.dim() == 2
        if self._groups is None:
            layers = (module for module in model.modules() if isinstance(module, MaloraLayer))
            self._groups = list(dict.fromkeys(layer.group for layer in layers))
        self._prefetched = prefetch_packed_weights(self._groups)
        self.log.start(mask if is_padding_mask else None)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """End the pass; after an exception in it, too."""
        self._depth -= 1
        if self._depth == 0:
            self.log.stop()
            drop_prefetched(self._prefetched)
            self._prefetched = []

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the hooks without the state of a pass."""
        return vars(self) | {"_groups": None, "_prefetched": [], "_depth": 0}


def _argument(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of the model's `forward`, given by name or by position, or None."""
    if not args or name in kwargs:
        return kwargs.get(name)
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get(name)
