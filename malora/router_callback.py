"""RouterCallback: the balance loss and statistics of the routers in the logs of `transformers.Trainer`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from malora.fused.tensor_utils import is_captured
from malora.load_balancing import balance_loss, has_router, router_summary


class RouterCallback(TrainerCallback):
    """Log the balance loss and statistics of the routers.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[malora.RouterCallback()])

    Each log entry of the training gets these values, averaged over the forward passes since the last entry. Passes
    without gradients do not count. On several processes the values are those of the process that logs.

    | name | value |
    | --- | --- |
    | `aux_loss` | balance loss without its weight; 1 if the routers are even |
    | `router_entropy` | mean entropy of the routers' probabilities, in nats |
    | `router_largest_share` | mean share of the tokens that a router's most used expert gets |
    | `router_unused_experts` | number of experts without a token in the pass, over all routers |

    They are in `trainer.state.log_history` and in what Trainer prints. Trainer reports to TensorBoard, W&B and others
    before it calls the callbacks of the user. `RouterCallback().add_to(trainer)` puts the callback before those.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)  # since the last log entry, still on the device
        self._handle: RemovableHandle | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Add the callback to a trainer before all others, so that trackers report the values, too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the forward passes of the model from now on.

        Raises:
            ValueError: The model has no router.
        """
        model: nn.Module = kwargs["model"]
        if not has_router(model):
            raise ValueError(
                "RouterCallback has no effect: no active adapter of the model has a router. Leave it out, or choose a "
                "method with more than one expert."
            )
        self._stop()
        self._handle = model.register_forward_hook(self._observe)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to an entry that has a training loss."""
        if logs is None or "loss" not in logs or not self._values:
            return
        values = {name: torch.stack(found).mean().item() for name, found in self._values.items()}
        self._values.clear()
        logs |= values
        if state.log_history:
            state.log_history[-1] |= values  # Trainer has copied the entry already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe no more."""
        self._stop()

    def _stop(self) -> None:
        self._values.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def observe_replay(self, model: nn.Module) -> None:
        """Observe a pass that was replayed as a CUDA graph, in which no hook runs (`malora.CaptureMixin`)."""
        with torch.no_grad():
            self._add(model, balance_loss(model))

    def _observe(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()) or is_captured(next(model.parameters())):
            return
        self._add(model, getattr(outputs, "aux_loss", None))

    def _add(self, model: nn.Module, aux_loss: Tensor | None) -> None:
        for name, value in router_summary(model).items():
            self._values[f"router_{name}"].append(value)
        if aux_loss is not None:
            self._values["aux_loss"].append(aux_loss.detach())
