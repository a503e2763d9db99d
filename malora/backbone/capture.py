"""Training passes as CUDA graphs: forward and backward of a micro-batch, captured once per shape and replayed.

A pass of a small model launches thousands of kernels of a few microseconds each. Launching them takes the host longer
than running them takes the GPU. A replay launches all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from malora.backbone.captured_pass import CapturedPass, Gradients, Pass
from malora.backbone.causal_attention import without_needless_mask
from malora.backbone.cuda_graphs import SideStream, capture_refresh
from malora.backbone.model_state import ModelState, why_not_captured
from malora.backbone.nested import map_tensors, signature_of, tensors_of
from malora.weight_cache import WeightCache

logger = logging.getLogger(__name__)

LossFunction = Callable[[Any, Any], Any]  # of the model and a micro-batch

EAGER_COST = "Every kernel is launched by itself: the results are the same, and steps of a small model take longer."


def capture_step(model: nn.Module, loss_function: LossFunction | None = None, *, max_graphs: int = 10) -> CapturedStep:
    """Return a training step that replays forward and backward as CUDA graphs.

        step = malora.capture_step(model)
        for micro_batches in batches:
            losses = step(micro_batches, scale=1 / len(micro_batches))
            optimizer.step()
            optimizer.zero_grad()

    The first micro-batch of a shape runs as usual, which also compiles its kernels. The second one is captured, and it
    and all later ones are replays. The first shape takes one step more. On a CPU, or where a model cannot be captured,
    every pass runs as usual and gives the same results. The reason is logged once.

    What Python does in a pass happens only when it is captured. So the loss function must not wait for the GPU
    (`.item()`, `print(loss)`), and what it reads must be in the micro-batch. All graphs share one memory, which is that
    of the largest one. A change of the model's parameters, modules, active adapters or mode is noticed, and passes are
    captured anew. Call `reset()` after a change that only Python sees, such as another dropout probability, and after
    `malora.optimize_backbone`, `restore_backbone` and `release_caches`.

    Args:
        model: The model to train, with its parameters on one device.
        loss_function: Gets the model and a micro-batch, and returns the loss, a tuple that begins with it, or a mapping
            with "loss". Defaults to `model(**micro_batch).loss`. Return few tensors, because each is kept and copied.
        max_graphs: Number of shapes to capture. Micro-batches of later shapes run as usual.
    """
    loss_of_batch = loss_function or model_loss

    def forward_backward(micro_batch: Any, scale: Tensor | float | None) -> Any:
        outputs = loss_of_batch(model, micro_batch)
        loss = _loss_in(outputs)
        (loss if scale is None else loss * scale).backward()
        return outputs

    return CapturedStep(model, forward_backward, max_graphs=max_graphs)


def model_loss(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """Return `model(**micro_batch).loss`, without a cache of keys and values.

    Raises:
        ValueError: The model returns no loss.
    """
    inputs = dict(micro_batch)
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs.setdefault("use_cache", False)
    with without_needless_mask(model, inputs):
        outputs = model(**inputs)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.get("loss")
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for the arguments {', '.join(map(str, inputs))}. Add labels to "
            "the micro-batch, or give capture_step a loss_function."
        )
    return loss  # type: ignore[no-any-return]


class CapturedStep:
    """Forward and backward of micro-batches, replayed as CUDA graphs. `capture_step` makes it for a loss.

    After a call, the gradients are added to those in the `.grad` of the parameters, as `loss.backward()` adds them.
    The gradients stay in the same memory, so copy those that you keep beyond `optimizer.zero_grad()`.

    Micro-batches are dictionaries, lists or tuples of tensors and other values. Tensors may be on the CPU; they are
    copied to the model's device. Every other value is a constant of the graph, and another value needs another graph.
    So give what varies, such as `num_items_in_batch`, as a tensor.

    Args:
        model: The model to train.
        forward_backward: Runs forward and backward of a micro-batch, with the loss multiplied by a factor that is not
            None, and returns the outputs.
        max_graphs: Number of shapes to capture.
        reason: Why passes are not to be captured; None if they are to be, where the model allows it.

    Attributes:
        reason: Why no pass is captured, or None. It is found out in the first call, and again after `reset()`.
        replayed: Whether the last micro-batch was a replay.
        captures: Number of passes captured so far, those included that were captured anew.
    """

    def __init__(
        self, model: nn.Module, forward_backward: Pass, *, max_graphs: int = 10, reason: str | None = None
    ) -> None:
        self.model, self.forward_backward, self.max_graphs = model, forward_backward, max_graphs
        self.reason, self._given_reason = reason, reason
        self.replayed = False
        self.captures = 0
        self._announced: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Drop all graphs and free their memory. They are captured anew when they are needed."""
        had_graphs = bool(getattr(self, "_graphs", None))
        self._graphs: dict[Hashable, CapturedPass] = {}
        self._seen: set[Hashable] = set()  # signatures whose kernels are compiled
        self._gradients: Gradients | None = None
        self._refresh_graph: Callable[[], None] | None = None
        self._weights = WeightCache(self.model)
        self._weights_are_fresh = False
        self._has_run = False  # a pass as usual
        self._is_warm = False  # the next pass runs as a captured one
        self._has_failed = False  # to capture a pass
        self._state: ModelState | None = None
        self._side_stream = SideStream()
        if had_graphs:
            torch.cuda.empty_cache()  # memory of dropped graphs serves nothing else before

    def __call__(self, micro_batches: Sequence[Any], *, scale: Tensor | float | None = None) -> list[Any]:
        """Run forward and backward of all micro-batches of an optimizer step.

        Under `DistributedDataParallel` gradients are averaged in the last one only.

        Args:
            micro_batches: One or more micro-batches.
            scale: Factor of each loss for the backward pass, such as one over the number of micro-batches.

        Returns:
            The outputs of the loss function for each micro-batch, without `scale` and without autograd graphs.
        """
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch, and the list is empty")
        no_sync: Callable[[], AbstractContextManager[Any]] = getattr(self.model, "no_sync", nullcontext)
        outputs = []
        for number, micro_batch in enumerate(micro_batches, 1):
            with no_sync() if number < len(micro_batches) else nullcontext():
                outputs.append(self.backward(micro_batch, scale=scale, refresh=number == 1))
        return outputs

    def backward(self, micro_batch: Any, *, scale: Tensor | float | None = None, refresh: bool = True) -> Any:
        """Run forward and backward of one micro-batch, for loops that accumulate gradients by themselves.

        Args:
            micro_batch: The micro-batch.
            scale: Factor of the loss for the backward pass.
            refresh: False if the model has neither changed nor run otherwise since the last micro-batch. The copies of
                the adapter's weights are then not made again, and changes of the model not looked for.

        Returns:
            The outputs of the loss function, without `scale` and without autograd graphs.
        """
        if refresh or self._state is None:
            self._begin()
        self.replayed = False
        if self.reason is not None:
            return self._run(micro_batch, scale)
        captured = self._find_or_capture(micro_batch, scale)
        if captured is None:
            return self._warm_up(micro_batch, scale)
        if not self._weights_are_fresh:
            self._refresh()
        self.replayed = True
        return captured.replay(micro_batch, scale)

    def _find_or_capture(self, micro_batch: Any, scale: Tensor | float | None) -> CapturedPass | None:
        """Return the graph for a micro-batch, or None if it is to run as usual."""
        signature = self._signature(micro_batch, scale)
        if signature is None or signature in self._graphs:
            return self._graphs.get(signature)
        if self._has_failed:
            return None
        if len(self._graphs) >= self.max_graphs:
            self._announce(
                f"{self.max_graphs} shapes of micro-batches are captured, and more have come. Those run as usual. "
                "Pad to fewer shapes (pad_to_multiple_of, packing), or raise max_graphs."
            )
            return None
        if signature in self._seen:
            return self._capture(signature, micro_batch, scale)
        if self._is_warm:
            self._seen.add(signature)
        return None

    def average_gradients(self) -> None:
        """Average the gradients over the processes of `torch.distributed`, in one all-reduce for each dtype.

        It takes the place of `DistributedDataParallel`, whose passes cannot be captured. Give `capture_step` the model
        itself, with equal weights in all processes, and call this after the last micro-batch of each optimizer step.
        All processes must have gradients of the same parameters.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            averages = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [one.view_as(g) for one, g in zip(averages, gradients, strict=True)])

    def _begin(self) -> None:
        """Notice changes of the model, and copy the adapter's weights for the passes that follow."""
        if self._state is None or (self.reason is None and self._state.has_changed()):
            if self._graphs:
                logger.info("The model has changed since its passes were captured; they are captured anew.")
            self.reset()
            self.reason = self._given_reason or why_not_captured(self.model)
            self._state = ModelState(self.model)
            if self.reason is not None:
                on_gpu = any(parameter.is_cuda for parameter in self.model.parameters())
                level = logging.WARNING if on_gpu else logging.INFO
                self._announce(f"Passes are not captured as CUDA graphs, because {self.reason}. {EAGER_COST}", level)
        self._refresh()

    def _refresh(self) -> None:
        # Captured passes read the addresses that the captured refresh writes. Another one might allocate anew.
        (self._refresh_graph or self._weights.refresh)()
        self._weights_are_fresh = True
        self._is_warm = self._has_run  # only then are there copies of weights

    def _signature(self, micro_batch: Any, scale: Tensor | float | None) -> Hashable | None:
        """Return what a graph is captured for; None if the micro-batch needs gradients of its own."""
        if any(tensor.requires_grad for tensor in tensors_of(micro_batch)) or not torch.is_grad_enabled():
            return None
        precision = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        try:
            return (precision, scale is None, signature_of(micro_batch))
        except TypeError as error:
            raise TypeError(
                f"a micro-batch for capture_step has tensors, and other values that are hashable: {error}"
            ) from error

    def _run(self, micro_batch: Any, scale: Tensor | float | None) -> Any:
        """Run a pass as usual."""
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) == 1:
            (device,) = devices
            micro_batch = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), micro_batch)
        with self._weights:
            outputs = self.forward_backward(micro_batch, scale)
        return map_tensors(Tensor.detach, outputs)

    def _warm_up(self, micro_batch: Any, scale: Tensor | float | None) -> Any:
        """Run a pass as usual, as a capture will run it."""
        with self._side_stream.active():
            outputs = self._run(micro_batch, scale)
        self._has_run = True
        self._weights_are_fresh = False  # it may have written weights of its own where replays read theirs
        return outputs

    def _capture(self, signature: Hashable, micro_batch: Any, scale: Tensor | float | None) -> CapturedPass | None:
        """Capture a pass; if that fails, log why and return None, now and for all other shapes until `reset()`."""
        try:
            if self._refresh_graph is None:
                self._refresh_graph = capture_refresh(self._weights)
            if self._gradients is None:
                self._gradients = Gradients(self.model)
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            with self._weights:
                captured = CapturedPass(
                    self.model,
                    self.forward_backward,
                    micro_batch,
                    scale,
                    self._gradients,
                    pool,
                    self._side_stream.stream,
                )
        except Exception as error:  # what a capture forbids is raised as all kinds of errors
            first = _first_of(error)
            message = f"a pass could not be captured as a CUDA graph: {type(first).__name__}: {first}"
            self._announce(f"Passes of this shape and of new ones run as usual, because {message}. {EAGER_COST}")
            self._has_failed = True
            if not self._graphs:
                self.reason, self._refresh_graph, self._gradients = message, None, None
            return None
        self._graphs[signature] = captured
        self.captures += 1
        logger.info("Captured a pass as CUDA graph %d of at most %d.", len(self._graphs), self.max_graphs)
        return captured

    def _announce(self, message: str, level: int = logging.WARNING) -> None:
        """Log a message, once."""
        if message not in self._announced:
            self._announced.add(message)
            logger.log(level, message)


def _loss_in(outputs: Any) -> Tensor:
    """Return the loss in the outputs of a loss function."""
    loss = outputs
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif isinstance(outputs, tuple) and outputs:
        loss = outputs[0]
    if not isinstance(loss, Tensor):
        raise TypeError(
            "the loss function of capture_step returns the loss as a tensor, a tuple that begins with it, or a mapping "
            f"with 'loss'; got {type(outputs).__name__}"
        )
    return loss


def _first_of(error: BaseException) -> BaseException:
    """Return the first of a chain of errors. Ending a broken capture raises more."""
    while error.__context__ is not None:
        error = error.__context__
    return error
