"""Hooks that surround every forward pass of a base model with adapted layers.

They are on the base model, because the tuner's own `forward` does not run in every pass. With
`peft.inject_adapter_in_model` there is no tuner, and a `PeftModel` without a task type calls the base model directly.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from malora.adapter_rows import AdapterRows
from malora.auxiliary_loss import add_balance_loss
from malora.fused.group import ProjectionGroup, drop_prefetched, prefetch_packed_weights
from malora.gate_scale import check_scale_is_matched
from malora.layer import MaloraLayer
from malora.routing import RoutingLog

if TYPE_CHECKING:
    from malora.fused.weight_cache import GroupAdapter

# The names that transformers' mixtures of experts use, in `forward` and in their config.
ROUTER_LOGITS, AUX_LOSS_WEIGHT = "output_router_logits", "router_aux_loss_coef"


class ForwardHooks:
    """The hooks of one base model, and the state that they keep.

    Before a pass they start the routing log and pack the weights of the fused layers. After it they add the balance
    loss to the outputs.

    Attributes:
        log: Routing of the model's last forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.log = RoutingLog()
        self._handles: list[RemovableHandle] = []
        self._layers: list[MaloraLayer] | None = None
        self._groups: list[ProjectionGroup] = []
        self._prefetched: list[GroupAdapter] = []
        self._router_logits: bool | None = None  # the argument of this name
        self._depth = 0  # a model may call itself
        self._base_has_routers = ROUTER_LOGITS in inspect.signature(model.forward).parameters

    @classmethod
    def on(cls, model: nn.Module) -> ForwardHooks:
        """Return the hooks of a base model. They are registered in the first call."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(owner := getattr(hook, "__self__", None), cls):
                return owner
        hooks = cls(model)
        hooks._handles = [
            model.register_forward_pre_hook(hooks._before, with_kwargs=True),
            model.register_forward_hook(hooks._after, with_kwargs=True, always_call=True),
        ]
        return hooks

    def remove(self, model: nn.Module) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self.announce_aux_loss(model, 0)

    def find_layers(self, model: nn.Module) -> None:
        """Find the adapted layers of the model, because some were added or removed."""
        self._layers = [module for module in model.modules() if isinstance(module, MaloraLayer)]
        self._groups = list(dict.fromkeys(layer.group for layer in self._layers))

    def announce_aux_loss(self, model: nn.Module, weight: float) -> None:
        """Tell losses outside of the model, such as TRL's, that its outputs have an `aux_loss`.

        TRL weighs and logs `outputs.aux_loss` if the config of the base model has the fields of a mixture of experts.
        A base model that is one itself has them already.

        Args:
            model: The base model.
            weight: Weight of the loss; 0 takes the fields away.
        """
        config = _text_config(model)
        if config is None or self._base_has_routers:
            return
        if weight:
            setattr(config, ROUTER_LOGITS, False)
            setattr(config, AUX_LOSS_WEIGHT, weight)
        else:
            vars(config).pop(ROUTER_LOGITS, None)
            vars(config).pop(AUX_LOSS_WEIGHT, None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        if self._layers is None:  # in a copy
            self.find_layers(model)
        if model.training and torch.is_grad_enabled():
            check_scale_is_matched(self._layers or ())
        if self.log.rows is None:
            self._prefetched = prefetch_packed_weights(self._groups)
        else:  # no layer is fused
            self._find_token_counts(self.log.rows, model, args, kwargs)
            device_type = next(model.parameters()).device.type
            in_autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if in_autocast else None
            self.log.rows.use_stacks(self.log.stacks, dtype)
        masks = (_argument(name, model, args, kwargs) for name in ("attention_mask", "decoder_attention_mask"))
        # It may be four-dimensional, or a dictionary by type of layer, and then says nothing of padding.
        self.log.start(*(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None for mask in masks))
        self.log.is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._router_logits = kwargs.get(ROUTER_LOGITS)
        if self._base_has_routers:
            return None
        if getattr(_text_config(model), ROUTER_LOGITS, False):  # TRL sets it, but the base model has no router logits
            setattr(_text_config(model), ROUTER_LOGITS, False)
        return args, {name: value for name, value in kwargs.items() if name != ROUTER_LOGITS}

    def _find_token_counts(
        self, rows: AdapterRows, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note how many tokens the batch has in all rows, for layers that see them flattened."""
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
            for prefix in ("", "decoder_"):
                x = _argument(prefix + name, model, args, kwargs)
                if isinstance(x, Tensor) and x.dim() == dims:
                    rows.flattened.add(x.shape[0] * x.shape[1])

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """End the pass; after an exception in it, too. The outputs are then None."""
        self._depth -= 1
        if self._depth > 0:
            return outputs
        self.log.stop()
        drop_prefetched(self._prefetched)
        self._prefetched = []
        if outputs is None:
            return None
        names = ("labels", "shift_labels", "num_items_in_batch")
        labels, shift_labels, items = (_argument(name, model, args, kwargs) for name in names)
        return add_balance_loss(
            model,
            self._layers or [],
            outputs,
            labels=labels,
            shift_labels=shift_labels,
            num_items=items,
            wanted=self._router_logits,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the hooks without the state of a pass."""
        return vars(self) | {"_layers": None, "_groups": [], "_prefetched": [], "_depth": 0}


def _text_config(model: nn.Module) -> Any:
    """Return the config of the language model, which transformers' models with several parts have; None if missing."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _argument(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of the model's `forward`, given by name or by position, or None."""
    if not args or name in kwargs:
        return kwargs.get(name)
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get(name)
