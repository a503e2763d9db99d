"""CaptureMixin: training steps of `transformers.Trainer` and its subclasses as CUDA graphs."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from malora.backbone.capture import CapturedStep
from malora.load_balancing import balance_loss
from malora.router_callback import RouterCallback

if TYPE_CHECKING:
    _Base = Trainer
else:  # the trainer comes after the mixin: `class CapturedTrainer(malora.CaptureMixin, Trainer)`
    _Base = object


class CaptureMixin(_Base):
    """Run the training steps of a trainer through `malora.capture_step`.

        class CapturedTrainer(malora.CaptureMixin, Trainer):
            pass

    Forward and backward of each shape of micro-batch are captured once and replayed. Losses, gradient accumulation,
    logs and checkpoints stay the trainer's own. Where the model cannot be captured (on a CPU, under
    DistributedDataParallel), the trainer runs as without the mixin. What cannot be captured is logged once.

    Pad to few shapes, with `pad_to_multiple_of` of a data collator or by packing. Micro-batches of an uncommon shape
    run as usual. Without padding on the left, leave out the `attention_mask`: a mask slows attention down in a graph.

    TRL's `SFTTrainer` reads metrics from the GPU in every micro-batch, which a graph cannot. So its logs lack entropy
    and token accuracy where passes are captured. Its loss is the same. With another `loss_type` than "nll", and in
    TRL's other trainers, passes are not captured.

    Attributes:
        max_graphs: Number of shapes to capture. A subclass may set another.
    """

    max_graphs: int = 10
    _captured_step: CapturedStep | None = None
    _refreshed_at: int | None = None  # the optimizer step for which the adapter's weights were copied
    _is_capturing = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and free the graphs at the end."""
        self._refreshed_at = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._captured_step is not None:
                self._captured_step.reset()
                self._captured_step = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch, as a replay if its shape has been captured."""
        step = self._step_of(model)
        if not model.training:  # after an evaluation
            model.train()  # else the step would find the model changed
        if isinstance(num_items_in_batch, int):  # as a number it would be a constant of the graph
            num_items_in_batch = torch.tensor(num_items_in_batch, device=self.args.device)
        micro_batch = {
            "inputs": dict(self._prepare_inputs(inputs)),
            "num_items_in_batch": num_items_in_batch,
            "accumulation": self.current_gradient_accumulation_steps,  # a constant of the graph
        }
        refresh = self._refreshed_at != self.state.global_step
        self._refreshed_at = self.state.global_step
        loss: Tensor = step.backward(micro_batch, refresh=refresh)
        if step.replayed:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RouterCallback):
                    callback.observe_replay(model)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does, without metrics that a captured pass cannot read."""
        if self._is_capturing and _is_sft(self):
            return self._sft_loss(model, inputs, *args, **kwargs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _step_of(self, model: nn.Module) -> CapturedStep:
        if self._captured_step is None or self._captured_step.model is not model:
            self._captured_step = CapturedStep(
                model, self._forward_backward, max_graphs=self.max_graphs, reason=_why_trainer_is_not_captured(self)
            )
        return self._captured_step

    def _forward_backward(self, micro_batch: dict[str, Any], scale: Tensor | float | None) -> Tensor:
        step = self._captured_step
        assert step is not None and scale is None
        inputs = dict(micro_batch["inputs"])  # a trainer may change the dictionary
        self._is_capturing = step.reason is None
        try:
            loss: Tensor = super().training_step(step.model, inputs, micro_batch["num_items_in_batch"])
        finally:
            self._is_capturing = False
        return loss

    def _sft_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Compute the loss of TRL's SFTTrainer: that of the labels, and the balance loss with the weight of TRL."""
        inputs = {**inputs, "use_cache": False, "output_router_logits": False}
        loss: Any = Trainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
        if getattr(self, "aux_loss_enabled", False):
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            weight: float = self.router_aux_loss_coef  # type: ignore[attr-defined]  # SFTTrainer has it
            loss = loss + weight * balance_loss(model) / steps
        return loss


def _is_sft(trainer: Trainer) -> bool:
    """Return whether the trainer is TRL's SFTTrainer or a subclass."""
    return any(kind.__module__ == "trl.trainer.sft_trainer" for kind in type(trainer).__mro__)


def _why_trainer_is_not_captured(trainer: Trainer) -> str | None:
    """Return why the loss of this trainer cannot be captured, or None if it may be tried."""
    if not _is_sft(trainer):
        return None
    options: Any = trainer.args
    if options.loss_type != "nll" or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "SFTTrainer reads metrics from the GPU with every loss but loss_type='nll' without label smoothing"
    base: Any = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    if getattr(trainer, "aux_loss_enabled", False) and "output_router_logits" in signature(base.forward).parameters:
        return "SFTTrainer adds the balance loss of a base model that is a mixture of experts itself"
    return None
