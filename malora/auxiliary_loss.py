"""Add the routers' load-balancing loss to the outputs of a model, as the MoE models of transformers do.

These models add `router_aux_loss_coef * aux_loss` to the loss that they return for labels, and report `aux_loss` in
their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from malora.layer import MaloraLayer
from malora.load_balancing import balance_loss_by_adapter

IGNORED_LABEL = -100  # transformers' label of positions that have no loss


def add_balance_loss(
    model: nn.Module,
    layers: Sequence[MaloraLayer],
    outputs: Any,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items: Tensor | int | None = None,
    wanted: bool | None = None,
) -> Any:
    """Return the outputs of a forward pass with the balance loss in them.

    The loss is added to the model's loss, if there is one, with the weight of each adapter. Outputs with names also
    get `aux_loss`, the sum of the adapters' balance losses without their weights. A tuple has no place for it.

    Args:
        model: The base model, after its forward pass.
        layers: All its adapted layers.
        outputs: A `ModelOutput`, a dictionary, or a tuple whose first element is the loss if there are labels.
        labels: The labels of that pass.
        shift_labels: Labels that are shifted already, if the pass had them.
        num_items: Number of labels by which the model divided its loss, `num_items_in_batch`.
        wanted: The argument `output_router_logits` of that pass. By default the balance loss is computed if there is a
            loss to add it to, or if there are gradients. So generation does not pay for it. With True the outputs have
            `aux_loss` in every case; it is 0 if nothing was routed.
    """
    loss = _loss_of(outputs, labels)
    is_computed = loss is not None or torch.is_grad_enabled() if wanted is None else wanted
    weights = _weights_by_adapter(layers) if is_computed else {}
    balance = balance_loss_by_adapter(layers, weights) if weights else {}
    if not balance:
        # A caller that asks for it counts on it. The active adapter may be one without a router.
        return _with_losses(outputs, loss, next(model.parameters()).new_zeros(())) if wanted else outputs
    aux_loss = torch.stack([*balance.values()]).sum()
    if loss is not None:
        added = torch.stack([weights[adapter] * of_adapter for adapter, of_adapter in balance.items()]).sum()
        if num_items is not None:
            added = added * _share_of_batch(model, labels, shift_labels, num_items)
        loss = loss + added.to(loss.device)
    return _with_losses(outputs, loss, aux_loss)


def _weights_by_adapter(layers: Sequence[MaloraLayer]) -> dict[str, float]:
    """Return `router_aux_loss_coef` of the adapters that routed something and whose weight is not 0."""
    weights = {}
    for layer in layers:
        for adapter in layer.routings:
            weights[adapter] = layer.settings[adapter].router_aux_loss_coef
    return {adapter: weight for adapter, weight in weights.items() if weight}


def _share_of_batch(
    model: nn.Module, labels: Tensor | None, shift_labels: Tensor | None, num_items: Tensor | int
) -> Tensor | float:
    """Return the share of this pass in a batch that is accumulated over several passes.

    With `num_items_in_batch` the model divides its loss by the number of labels in the whole batch, and `Trainer` does
    not divide it by the number of passes. So the balance loss is weighted by the share of the labels. The weights of
    all passes of a batch then add up to one, on several processes too.
    """
    if shift_labels is not None:
        labels = shift_labels
    elif labels is not None and _shifts_labels(model):
        labels = labels[..., 1:]  # the first token is not predicted
    if labels is None:
        return 1.0
    share: Tensor = (labels != IGNORED_LABEL).sum() / num_items
    return share


def _shifts_labels(model: nn.Module) -> bool:
    """Return whether the loss of a model of transformers compares a token's output with the next token's label."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss and not is_encoder_decoder


def _loss_of(outputs: Any, labels: Tensor | None) -> Tensor | None:
    """Return the loss in the outputs, or None if there is none."""
    loss = None
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, tuple) and outputs and labels is not None:
        loss = outputs[0]
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _with_losses(outputs: Any, loss: Tensor | None, aux_loss: Tensor) -> Any:
    """Return the outputs with this loss, if it is not None, and this auxiliary loss."""
    losses = {} if loss is None else {"loss": loss}
    if isinstance(outputs, tuple):
        return outputs if loss is None else type(outputs)((loss, *outputs[1:]))
    if not isinstance(outputs, Mapping):
        return outputs
    own = outputs.get("aux_loss")  # of a base model that is a mixture of experts itself
    losses["aux_loss"] = aux_loss if own is None else own + aux_loss.to(own.device)
    if not isinstance(outputs, ModelOutput):
        return {**outputs, **losses}
    return _class_with_aux_loss(type(outputs))(**{**outputs, **losses})


_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {}  # that were made, by the class of the model's outputs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # the compiler cannot make a class
def _class_with_aux_loss(outputs: type[ModelOutput]) -> type[ModelOutput]:
    """Return a class of model outputs with the field `aux_loss`; it is a subclass if the field is missing."""
    if any(field.name == "aux_loss" for field in fields(outputs)):  # type: ignore[arg-type]  # each is a dataclass
        return outputs
    if outputs in _CLASSES:
        return _CLASSES[outputs]

    def reduce(self: ModelOutput) -> tuple[Any, ...]:  # pickle does not find a class that was made at run time
        return _rebuild, (outputs, dict(self))

    made = make_dataclass(
        f"{outputs.__name__}WithAuxLoss",
        [("aux_loss", Tensor | None, None)],
        bases=(outputs,),
        namespace={"__reduce__": reduce, "__module__": __name__, "__doc__": f"{outputs.__name__} with `aux_loss`."},
    )
    _CLASSES[outputs] = made
    return _CLASSES[outputs]


def _rebuild(outputs: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    rebuilt: ModelOutput = _class_with_aux_loss(outputs)(**values)
    return rebuilt
