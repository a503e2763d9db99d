"""Frozen half of a projection group.

There are three ways to compute x Wᵀ + h B, and their gradients:

| base | forward | backward |
| --- | --- | --- |
| `PlainBase` | two GEMMs per projection | dh by its own GEMMs, dx by one GEMM per projection |
| `AugmentedBase` | one GEMM per projection over [x h] and [W Bᵀ] | as `PlainBase` |
| `FourBitBase` | as `PlainBase`, with W dequantized | as `PlainBase`, with W dequantized again |
| `Float8Base` | one float8 GEMM per projection over [x h·u] and [W (B/u)ᵀ] | [dx dh] by one float8 GEMM |

Shapes: T tokens, n in, m out, G projections, H total rank of a projection's experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora.fused.augmented_weights import augmented_weights
from malora.fused.four_bit_weights import FourBitWeight, has_four_bits
from malora.fused.fp8_weights import Float8Weights, Task, quantized_weights
from malora.fused.kernels.down_tiling import aligned_rows
from malora.fused.kernels.quantize_fp8 import UpOperand
from malora.fused.kernels.transpose_copy import write_up_proj
from malora.fused.packed_weights import PackedWeights
from malora.fused.streams import run_on_parallel_streams
from malora.fused.weight_cache import GroupAdapter, GroupWeightCache, LoadedUpProj


class Base(Protocol):
    """Frozen weights of a projection group for one forward pass and its backward pass."""

    def saved(self) -> list[Tensor]:
        """Return the weights [m, n] that autograd is to save for the gradient of x."""

    def for_backward(self) -> Base:
        """Return this base without the weights that autograd saves."""

    def weights_for_backward(self, saved: Sequence[Tensor]) -> Iterable[Tensor]:
        """Yield the weights [m, n] for the gradient of x, where `joint_gradients` does not compute it.

        Each is used before the next one is asked for.

        Args:
            saved: what `saved` returned in the forward pass.
        """

    def allocate_x_and_h(self, x: Tensor) -> Tensor | None:
        """Allocate memory for x and h of all projections next to each other.

        The memory is [T, n + G·H8]. It is allocated only if `outputs` reads that.
        """

    def load_up_proj(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """Return tasks that bring B [H, m] where `outputs` reads it. They do not need h."""

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """Return x Wᵀ + alpha · h B + bias of each projection, [T, m]."""

    def joint_gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float) -> tuple[Tensor, Tensor] | None:
        """Return Σ dy W [T, n] and alpha · dy Bᵀ [G, T, H] if one GEMM computes both.

        Otherwise return None.
        """


class PlainBase:
    """The frozen weights as they are."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None]) -> None:
        self.weights, self.biases = weights, biases

    def saved(self) -> list[Tensor]:
        """See `Base`."""
        return self.weights

    def for_backward(self) -> Base:
        """See `Base`."""
        return PlainBase([], [])

    def weights_for_backward(self, saved: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Base`."""
        return saved

    def allocate_x_and_h(self, x: Tensor) -> Tensor | None:
        """See `Base`."""
        return None

    def load_up_proj(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """See `Base`."""
        return []

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """See `Base`."""
        operands = zip(self.weights, self.biases, h, Bs, strict=True)
        return run_on_parallel_streams(x, [partial(_two_matmuls, x, *of_each, alpha) for of_each in operands])

    def joint_gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float) -> tuple[Tensor, Tensor] | None:
        """See `Base`."""
        return None


def _two_matmuls(x: Tensor, W: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Return x Wᵀ + alpha · h B + bias.

    The base comes second: adding to what is there hides behind its arithmetic.
    """
    start = x.new_empty(()) if bias is None else bias.to(x.dtype)
    y = torch.addmm(start, h, B, beta=0 if bias is None else 1, alpha=alpha)
    return y.addmm_(x, W.T)


class AugmentedBase(PlainBase):
    """The frozen weights with padded columns, into which Bᵀ is written."""

    def __init__(
        self, weights: list[Tensor], biases: list[Tensor | None], augmented: list[Tensor], H8: int, is_loaded: bool
    ) -> None:
        super().__init__(weights, biases)
        self.augmented, self.H8, self.is_loaded = augmented, H8, is_loaded

    def allocate_x_and_h(self, x: Tensor) -> Tensor | None:
        """See `Base`."""
        return aligned_rows(x, x.shape[1] + len(self.augmented) * self.H8)

    def load_up_proj(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """See `Base`."""
        return [] if self.is_loaded else [partial(write_up_proj, self.augmented, Bs, alpha)]

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """See `Base`. `x` is all of [x h] here, [T, n + G·H8]."""

        def output(W: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x[:, : W.shape[1]], W, None if bias is None else bias.to(x.dtype))

        operands = zip(self.augmented, self.biases, strict=True)
        return run_on_parallel_streams(x, [partial(output, *of_each) for of_each in operands])


class FourBitBase(PlainBase):
    """Frozen weights in 4 bits, some of them or all.

    Args:
        frozen: the weights. Of those that are not in 4 bits, the dtype is that of the pass.
        biases: the biases.
        dtype: dtype of the pass.
        trains: whether a backward pass may follow.
    """

    def __init__(
        self, frozen: list[Tensor | FourBitWeight], biases: list[Tensor | None], dtype: torch.dtype, *, trains: bool
    ) -> None:
        super().__init__([], biases)
        self.frozen, self.dtype, self.trains = frozen, dtype, trains

    def for_backward(self) -> Base:
        """See `Base`."""
        return self

    def weights_for_backward(self, saved: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Base`."""
        return map(self._dequantized, self.frozen)

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """See `Base`."""

        def output(W: Tensor | FourBitWeight, bias: Tensor | None, h_g: Tensor, B: Tensor) -> Tensor:
            if isinstance(W, FourBitWeight) and not self.trains:
                return W.product(x, bias).addmm_(h_g, B, alpha=alpha)
            return _two_matmuls(x, self._dequantized(W), bias, h_g, B, alpha)

        operands = zip(self.frozen, self.biases, h, Bs, strict=True)
        return run_on_parallel_streams(x, [partial(output, *of_each) for of_each in operands])

    def _dequantized(self, W: Tensor | FourBitWeight) -> Tensor:
        return W.dequantized(self.dtype) if isinstance(W, FourBitWeight) else W


class Float8Base:
    """The frozen weights in float8."""

    def __init__(
        self, weights: Float8Weights, biases: list[Tensor | None], cache: GroupWeightCache, loaded: LoadedUpProj | None
    ) -> None:
        self.weights, self.biases, self.cache, self.loaded = weights, biases, cache, loaded
        self.up_scales = None if loaded is None else loaded.up_scales

    def saved(self) -> list[Tensor]:
        """See `Base`."""
        return []

    def for_backward(self) -> Base:
        """See `Base`."""
        return self

    def weights_for_backward(self, saved: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Base`."""
        return saved

    def allocate_x_and_h(self, x: Tensor) -> Tensor | None:
        """See `Base`."""
        return None

    def load_up_proj(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """See `Base`."""
        if self.up_scales is not None:
            return []
        self.up_scales = self.weights.new_up_scales(Bs[0])
        return self.weights.load_up_proj(Bs, alpha, self.up_scales)

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """See `Base`."""
        assert self.up_scales is not None
        return self.weights.outputs(x, self.biases, UpOperand(h, self.up_scales))

    def joint_gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float) -> tuple[Tensor, Tensor] | None:
        """See `Base`."""
        if self.loaded is not None and self.cache.loaded is self.loaded:
            return self.weights.gradients(dys, Bs, [])
        self.cache.loaded = None
        return self.weights.gradients(dys, Bs, self.weights.load_up_proj_backward(Bs, alpha))


class WithoutOutputs:
    """Another base in a pass whose outputs nobody reads, but whose saved tensors somebody needs."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def saved(self) -> list[Tensor]:
        """See `Base`."""
        return self.base.saved()

    def for_backward(self) -> Base:
        """See `Base`."""
        return self.base.for_backward()

    def weights_for_backward(self, saved: Sequence[Tensor]) -> Iterable[Tensor]:
        """See `Base`."""
        return self.base.weights_for_backward(saved)

    def allocate_x_and_h(self, x: Tensor) -> Tensor | None:
        """See `Base`."""
        return None

    def load_up_proj(self, Bs: list[Tensor], alpha: float) -> list[Task]:
        """See `Base`."""
        return []

    def outputs(self, x: Tensor, h: Tensor, Bs: list[Tensor], alpha: float) -> list[Tensor]:
        """Return uninitialized memory, [T, m] of each projection."""
        return [x.new_empty(len(x), B.shape[1]) for B in Bs]

    def joint_gradients(self, dys: list[Tensor], Bs: list[Tensor], alpha: float) -> tuple[Tensor, Tensor] | None:
        """See `Base`."""
        return self.base.joint_gradients(dys, Bs, alpha)


def choose_base(adapter: GroupAdapter, packed: PackedWeights, x: Tensor, *, has_dropout: bool) -> Base:
    """Return the base for a pass over x [T, n] that reads these packed weights.

    With dropout the down projection's kernel copies x on its way, so [x h] costs no pass of its own. Without dropout
    the frozen weights are read as they are, padded columns or not.
    """
    cache, linears = adapter.cache, [layer.base_layer for layer in adapter.layers]
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    float8 = float8_weights(adapter, backward=x.requires_grad)
    loaded = cache.loaded_for(packed, float8)
    if float8 is not None:
        return Float8Base(float8, biases, cache, loaded)
    if any(map(has_four_bits, linears)):
        frozen = [_frozen(linear, x.dtype) for linear in linears]
        return FourBitBase(frozen, biases, x.dtype, trains=torch.is_grad_enabled())
    weights = [linear.weight.to(x.dtype) for linear in linears]
    augmented = augmented_weights(adapter.layers, cache, adapter.layout.H8) if has_dropout else None
    if augmented is not None and augmented[0].dtype == x.dtype:
        return AugmentedBase(weights, biases, augmented, adapter.layout.H8, loaded is not None)
    return PlainBase(weights, biases)


def _frozen(linear: nn.Module, dtype: torch.dtype) -> Tensor | FourBitWeight:
    """Return a weight [m, n] in a dtype, or in 4 bits if it is so."""
    weight: Any = linear.weight
    return FourBitWeight(weight.data, weight.quant_state) if has_four_bits(linear) else weight.to(dtype)


def float8_weights(adapter: GroupAdapter, *, backward: bool) -> Float8Weights | None:
    """Return the float8 copies of an adapter's frozen weights.

    Return None if the adapter's backend is another.
    """
    if adapter.config.backend != "fp8":
        return None
    linears = [layer.base_layer for layer in adapter.layers]
    return quantized_weights(linears, adapter.cache.float8, backward=backward, H=adapter.layout.H8)


def load_up_proj_for_step(adapter: GroupAdapter, packed: PackedWeights, up_scales: Tensor | None) -> Tensor | None:
    """Bring B next to the frozen weights, if it has a place there.

    This serves all passes that read these packed weights.

    Args:
        adapter: the adapter.
        packed: its packed weights.
        up_scales: factors of h from the last call, which CUDA graphs read; they are written anew.

    Returns:
        The factors of h, if the frozen weights are in float8.
    """
    cache, alpha = adapter.cache, adapter.layout.alpha
    float8 = float8_weights(adapter, backward=True)
    tasks: list[Task]
    if float8 is not None:
        up_scales = float8.new_up_scales(packed.B[0]) if up_scales is None else up_scales
        tasks = float8.load_up_proj(packed.B, alpha, up_scales) + float8.load_up_proj_backward(packed.B, alpha)
    else:
        augmented = augmented_weights(adapter.layers, cache, adapter.layout.H8)
        if augmented is None or augmented[0].dtype != packed.down.dtype:
            return None
        tasks = [partial(write_up_proj, augmented, packed.B, alpha)]
    for task in tasks:
        task()
    cache.loaded = LoadedUpProj(packed, float8, up_scales)
    return up_scales
