"""Forward passes whose rows belong to different adapters, by PEFT's argument `adapter_names`.

PEFT's LoRA allows them in inference only. Here they run in training too, also with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from malora.adapter_rows import NO_ADAPTER, AdapterRows
from malora.layer import MaloraLayer
from malora.parameter_layer import ParamWrapper
from malora.routing import RoutingLog, WeakReference

CHECKPOINT = "_gradient_checkpointing_func"  # the attribute by which transformers' layers call the checkpoint function


def make_rows(model: nn.Module, names: Any, generation: dict[str, Any]) -> AdapterRows:
    """Check the argument `adapter_names` of a call.

    Args:
        model: The base model with adapted layers.
        names: The argument.
        generation: The other arguments of the call. With `num_beams` or `num_return_sequences`, `generate` repeats the
            rows of the batch.

    Raises:
        TypeError: The argument is not a list of names.
        ValueError: An adapter does not exist, or one is merged, or one adapts parameters.
    """
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str, one per row of the batch.")
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError(
            "malora.ParamWrapper does not support mixed adapter batches yet. All rows of a batch read the same "
            "weights, so adapter_names cannot be used with target_parameters. Run each adapter's rows by themselves."
        )
    layers = [module for module in model.modules() if isinstance(module, MaloraLayer)]
    known = {name for layer in layers for name in layer.settings}
    if unknown := sorted(set(names) - known - {NO_ADAPTER}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Choose from "
            f"{', '.join(sorted(known))}, or {NO_ADAPTER} for the base model."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    config = generation.get("generation_config")
    found = (generation.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences"))
    return AdapterRows(names, max([1, *(count for count in found if isinstance(count, int))]))


@contextmanager
def assign_rows(model: nn.Module, log: RoutingLog, rows: AdapterRows) -> Iterator[None]:
    """Let the layers of a model use the adapter of each row inside the `with` block.

    Gradient checkpointing runs layers again in the backward pass, outside the block. So the checkpoint function of
    transformers gets a function that assigns the rows again. Other ways of checkpointing run layers again without it.

    Args:
        model: The base model.
        log: Its routing log, in which the layers find the rows.
        rows: The rows of the batch.
    """
    with ExitStack() as stack:
        for module in model.modules():
            checkpoint = vars(module).get(CHECKPOINT)
            if checkpoint is not None and module.training:
                setattr(module, CHECKPOINT, partial(_checkpoint, checkpoint, module, WeakReference(log), rows))
                stack.callback(setattr, module, CHECKPOINT, checkpoint)
        stack.enter_context(_rows_in_use(model, log, rows))
        yield


@contextmanager
def _rows_in_use(module: nn.Module, log: RoutingLog, rows: AdapterRows) -> Iterator[None]:
    """Assign the rows to the adapted layers, and to PEFT's wrappers of other trained modules in this module."""
    before, log.rows = log.rows, rows
    wrappers = [m for m in module.modules() if isinstance(m, AuxiliaryTrainingWrapper)] if before is not rows else []
    handles = [m.register_forward_pre_hook(partial(_add_names, rows), with_kwargs=True) for m in wrappers]
    try:
        yield
    finally:
        log.rows = before
        for handle in handles:
            handle.remove()


def _add_names(rows: AdapterRows, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give PEFT's wrapper of a module, such as those of `modules_to_save`, the argument that it takes."""
    x: Tensor = args[0]
    return args, {**kwargs, "adapter_names": rows.names_of(x)}


def _checkpoint(
    checkpoint: Callable[..., Any],
    module: nn.Module,
    log: WeakReference[RoutingLog],
    rows: AdapterRows,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    return checkpoint(partial(_run_with_rows, module, log, rows, function), *args, **kwargs)


def _run_with_rows(
    module: nn.Module,
    reference: WeakReference[RoutingLog],  # the autograd graph keeps it, and the log leads to the graph
    rows: AdapterRows,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    log = reference()
    if log is None:
        return function(*args, **kwargs)
    with _rows_in_use(module, log, rows):
        return function(*args, **kwargs)
