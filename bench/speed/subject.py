"""Build the model of a variant on the backbone that all variants share."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import malora
from bench.errors import UserError
from bench.speed.baselines import LigerKernels, has_liger
from bench.speed.variants import CONFIGS, OURS, Variant


class Subject:
    """The model of one variant. Its frozen weights are those of the shared backbone.

    `park()` moves the variant's own tensors to host memory while other variants are measured, and `load()` moves them
    back. Modules and parameters stay the same objects, so nothing is compiled twice.

    Attributes:
        model: The backbone, with the variant's adapter if it has one.
        own: Parameters and buffers that the variant does not share.
        autocast: Whether a pass runs under bfloat16 autocast.

    Raises:
        UserError: If the variant needs a package that is not installed.
    """

    def __init__(self, variant: Variant, base: PreTrainedModel, mode: str, dropout: float) -> None:
        training = mode == "train"
        self.variant, self.device = variant, base.device
        shared: dict[int, Tensor] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        backbone = copy.deepcopy(base, dict(shared))
        self.kernels = _liger_kernels(backbone) if variant.liger and variant.backend is None else nullcontext()
        in_base_dtype = variant.plain or not (training or variant.out_of_the_box)
        dtype = base.dtype if in_base_dtype else torch.float32
        self.model: PreTrainedModel | PeftModel = backbone
        if variant.method is not None:
            self.model = _adapt(backbone, variant.method, variant.backend, dropout, dtype)
        self.own: list[Tensor] = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in shared]
        self.autocast = training and dtype != base.dtype and variant.method is not None
        # Padded weights serve training only; float8 linear layers serve every mode.
        self._optimizes = variant.backend == "fp8" or (training and variant.backend == "fused") or self._has_our_kernels
        if training and variant.method is None:
            # Without an adapter nothing requires a gradient. This makes the backward pass run to the activations.
            backbone.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        self.model.train(training)
        if variant.run != "eager" and mode != "decode" and not variant.liger:
            _compile_layers(backbone)
        if variant.run != "eager" and training:
            _compile_loss(backbone)

    @property
    def _has_our_kernels(self) -> bool:
        """Whether our kernels for the frozen layers are used: in rows of ours that are named after Liger's."""
        return self.variant.liger and self.variant.backend is not None

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def precision(self) -> AbstractContextManager[object]:
        """Return the autocast context of a pass, or one that does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def load(self) -> None:
        """Move the variant's own tensors to the device and prepare the model to run."""
        self.kernels.__enter__()
        for tensor in self.own:
            tensor.data = tensor.data.to(self.device)
        if self._optimizes:
            ours = self._has_our_kernels
            # The rows are compared with others that compute all logits.
            malora.optimize_backbone(
                self.model, rotary=ours, activation=ours, norm=ours, loss=False, padding=self.model.training
            )

    def park(self) -> None:
        """Move the variant's own tensors to host memory.

        Everything that was derived from weights is freed.
        """
        self.kernels.__exit__(None, None, None)
        for tensor in self.own:
            tensor.grad = None
            tensor.data = tensor.data.to("cpu")
        malora.release_caches(self.model)


def _liger_kernels(model: PreTrainedModel) -> AbstractContextManager[object]:
    if not has_liger():
        raise UserError("liger_kernel is not installed")
    return LigerKernels(model)


def _adapt(model: PreTrainedModel, method: str, backend: str | None, dropout: float, dtype: torch.dtype) -> PeftModel:
    """Put an adapter on the model, with trainable weights in `dtype`.

    No factor is left at zero.
    """
    options = {"lora_dropout": dropout} | ({"backend": backend} if backend else {})
    torch.manual_seed(0)
    # The paper's initialisation computes an SVD per layer (minutes at 7B) and sets B to zero, unlike any trained
    # adapter. So our adapters are created on the meta device and then filled with random values.
    adapted = get_peft_model(model, CONFIGS[method](**options), low_cpu_mem_usage=method in OURS)
    assert isinstance(adapted, PeftModel)
    for module in adapted.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not ("lora_" in name or parameter.requires_grad or parameter.is_meta):
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=model.device)
            keep = not parameter.is_meta and parameter.any()
            value = value.copy_(parameter) if keep else value.normal_(std=0.02)
            module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return adapted


def _compile_loss(model: PreTrainedModel) -> None:
    """Compile the loss.

    Eager cross entropy writes float32 logits, their softmax and the gradients of both.
    """
    model.loss_function = torch.compile(model.loss_function)


def _compile_layers(model: PreTrainedModel) -> None:
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module.compile()
