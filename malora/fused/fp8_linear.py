"""Float8 computation of un-adapted frozen linear layers.

They run next to adapted ones with `backend="fp8"`. `malora.optimize_backbone(model)` converts every other `nn.Linear`
of the parents of such adapted layers: with the paper's targets, the output projections of attention. A head that is the
model's own child stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from malora.fused.availability import warn_once
from malora.fused.tensor_utils import flatten_tokens

if TYPE_CHECKING:
    from malora.fused.fp8_weights import Float8Weights
    from malora.fused.group import ProjectionGroup


class Float8LinearFunction(torch.autograd.Function):
    """Output of one frozen linear layer with float8 weights.

    It is x Wᵀ + bias [T, m], from x [T, n] and a bias or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weights: Float8Weights) -> Tensor:
        """Return x Wᵀ + bias [T, m]."""
        ctx.weights = weights
        return weights.outputs(x, [bias])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x [T, n], dy W for dy [T, m]."""
        return ctx.weights.input_gradient(dy), None, None


class Float8Linear(nn.Linear):
    """An `nn.Linear` that computes in float8 while an adapter of its parent does.

    It is made by changing the class of a module, so that its name, parameters and hooks stay. `restore_linear` changes
    it back.
    """

    # The projection groups of its parent. In a tuple, so that their layers do not become submodules. Only there while
    # the module is converted: a `forward` that somebody kept may be called later.
    _groups: tuple[ProjectionGroup, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Return input Wᵀ + bias, [..., m] for input [..., n]."""
        group = next((group for group in vars(self).get("_groups", ()) if _runs_fp8(group)), None)
        y = None if group is None else self._forward_fp8(input, group)
        return nn.Linear.forward(self, input) if y is None else y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_fp8(self, x: Tensor, group: ProjectionGroup) -> Tensor | None:
        from malora.fused.fp8_weights import quantized_weights  # needs Triton

        if any(parameter.requires_grad for parameter in self.parameters()):
            return None
        backward = torch.is_grad_enabled() and x.requires_grad
        weights = quantized_weights([self], group.cache.float8, backward=backward, instead="nn.Linear")
        if weights is None:
            return None
        y: Tensor = Float8LinearFunction.apply(flatten_tokens(x), self.bias, weights)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)


def _runs_fp8(group: ProjectionGroup) -> bool:
    """Return whether a layer of the group is computed in float8 now."""
    adapters = ((layer, layer.adapter_for_fused_path()) for layer in group.layers)
    return any(adapter is not None and layer.settings[adapter].backend == "fp8" for layer, adapter in adapters)


def convert_unadapted_linears(parent: nn.Module, groups: Iterable[ProjectionGroup]) -> None:
    """Convert the plain `nn.Linear` children of a module.

    Other children of the module belong to these groups.
    """
    groups = tuple(groups)
    for module in parent.children():
        if type(module) not in (nn.Linear, Float8Linear):
            continue
        if "forward" in vars(module):  # accelerate's hooks replace the class's
            warn_once("fp8", "a frozen linear layer whose forward was replaced", "that")
            continue
        module.__class__ = Float8Linear
        assert isinstance(module, Float8Linear)
        module._groups = groups


def restore_linear(module: nn.Module) -> None:
    """Make a converted module a plain `nn.Linear` again.

    Its float8 weights are dropped. Other modules stay as they are.
    """
    if not isinstance(module, Float8Linear):  # another class may have a `_groups` of its own
        return
    for group in vars(module).pop("_groups", ()):
        if group.has_cache:
            group.cache.float8.pop((id(module), 0), None)
    if type(module) is Float8Linear:
        module.__class__ = nn.Linear  # type: ignore[assignment]  # its class before
