"""The loss of causal language models, computed from hidden states chunk by chunk and without keeping logits.

It is used in training, with labels, while the output head is a frozen `nn.Linear`. The outputs then have no logits.
Everything else runs the model's own forward: evaluation, generation, and heads that are trained or have an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from malora.backbone.linear_cross_entropy import LabelPositions, linear_cross_entropy
from malora.backbone.probe import FixedLinear, bare_copy, has_own_forward, is_close, numbers, result_of


@dataclass
class LossSettings:
    """What the forward pass of a language model needs to know.

    Attributes:
        head: Name of the output head.
        cap: Bound of the logits, or None.
    """

    head: str
    cap: float | None


class _Backbone(nn.Module):
    """A stand-in for the model below the head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def settings(module: nn.Module) -> LossSettings | None:
    """Return the settings of a causal language model; None if its loss is something else."""
    name = _name_of_head(module)
    if name is None or not isinstance(module, PreTrainedModel) or module.loss_function is not ForCausalLMLoss:
        return None
    config = module.config.get_text_config()
    hidden, labels = 30 * numbers(1, 4, 2), torch.tensor([[0, 1, 0, 1]])
    matrix = numbers(config.vocab_size, 2)
    children = {name: FixedLinear(matrix), module.base_model_prefix: _Backbone(hidden)}
    outputs = result_of(lambda: bare_copy(module, children).forward(input_ids=labels, labels=labels))
    if type(outputs) is not CausalLMOutputWithPast:
        return None
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    logits = hidden @ matrix.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    return LossSettings(name, cap) if is_close(outputs.loss, expected) else None


def _name_of_head(module: nn.Module) -> str | None:
    """Return the name of the output head of a model that is a head on a base model and nothing else."""
    if not isinstance(module, PreTrainedModel) or module.base_model_prefix not in module._modules:
        return None
    heads = set(module._modules) - {module.base_model_prefix}
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return heads.pop() if len(heads) == 1 and head is module._modules[min(heads)] else None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that computes the loss without logits where it can."""
    original = base.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None or not _applies(self, args, kwargs):
            return original(self, *args, **kwargs)
        return _forward_without_logits(self, *args, **kwargs)

    return forward


def _applies(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a forward pass can do without logits."""
    if torch.compiler.is_compiling() or not model.training or len(args) > 1:
        return False
    keeps_all = isinstance(keep := kwargs.get("logits_to_keep", 0), int) and keep == 0
    return keeps_all and model.loss_function is ForCausalLMLoss and has_frozen_head(model)


def has_frozen_head(model: Any) -> bool:
    """Return whether the head is a linear layer that nobody trains, replaces or listens to."""
    head = model._modules.get(model.malora_settings.head)
    if type(head) is not nn.Linear or has_own_forward(head) or head._forward_hooks or head._forward_pre_hooks:
        return False
    # Weights that are sharded over processes are of another type.
    return all(type(parameter) is nn.Parameter and not parameter.requires_grad for parameter in head.parameters())


@can_return_tuple  # type: ignore[untyped-decorator]
def _forward_without_logits(
    model: Any, *args: Any, labels: Tensor, logits_to_keep: int = 0, **kwargs: Any
) -> CausalLMOutputWithPast:
    """Do what the forward of a causal language model does with labels, without logits in the outputs."""
    own: LossSettings = model.malora_settings
    ignored = kwargs.get("ignore_index", -100)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    head = model._modules[own.head]
    targets = targets.reshape(-1).to(head.weight.device)
    positions = LabelPositions(targets, ignored)
    outputs = model._modules[model.base_model_prefix](*args, **kwargs)
    hidden = outputs.last_hidden_state.flatten(0, -2)
    loss = linear_cross_entropy(
        hidden, head.weight, head.bias, targets, rows=positions.rows(), ignored=ignored, cap=own.cap
    )
    num_items = kwargs.get("num_items_in_batch")
    if isinstance(num_items, Tensor):
        num_items = num_items.to(loss.device)
    loss = loss / (positions.count if num_items is None else num_items)
    names = {field.name for field in fields(CausalLMOutputWithPast)} & set(outputs)
    return CausalLMOutputWithPast(loss=loss, **{name: outputs[name] for name in names})
