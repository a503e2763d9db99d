"""Tensors in nested dictionaries, lists and tuples, such as batches and outputs of models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to each tensor in it.

    Mappings of any type become dictionaries. Other values stay as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(function, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        mapped = [map_tensors(function, inner) for inner in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in `value`, in the order in which `map_tensors` visits them."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(visit, value)
    return found


def signature_of(value: Any) -> Hashable:
    """Return what a captured pass over `value` depends on, except for the elements of tensors.

    This is the nesting, the shape and dtype of each tensor, and every other value.

    Raises:
        TypeError: Something in `value` is neither a tensor, nor a container of tensors, nor hashable.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, Mapping):
        return ("mapping", *((name, signature_of(inner)) for name, inner in value.items()))
    if isinstance(value, list | tuple):
        return (type(value), *map(signature_of, value))
    hash(value)
    return (type(value), value)
