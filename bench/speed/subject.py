"""Build the model of a variant on the shared backbone."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import malora
from bench.errors import UserError
from bench.speed.variants import CONFIGS, Variant
from malora.backbone.liger import LigerKernels, has_liger


class Subject:
    """A variant that was built: its model, whose frozen weights are those of the one backbone that all share.

    What is the variant's own can be parked in the host's memory while others are measured. Its modules and parameters
    stay the same objects, so that nothing has to be compiled twice.

    Raises:
        UserError: the variant needs a package that is not installed.
    """

    def __init__(self, variant: Variant, base: PreTrainedModel, mode: str, dropout: float) -> None:
        training = mode == "train"
        self.variant, self.device = variant, base.device
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.model: nn.Module = copy.deepcopy(base, dict(shared))
        self.kernels: AbstractContextManager = nullcontext()
        if variant.liger:
            if not has_liger():
                raise UserError("liger_kernel is not installed")
            self.kernels = LigerKernels(self.model, out_of_the_box=variant.backend is None)
        narrow = variant.plain or not (training or variant.out_of_the_box)
        dtype = base.dtype if narrow else torch.float32
        if variant.method is not None:
            self.model = self._adapt(variant, dropout, dtype)
        self.own: list[Tensor] = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in shared]
        self.autocast = training and dtype != base.dtype and variant.method is not None
        if training and variant.method is None:
            # The floor's backward pass goes down to the activations.
            self.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        self.model.train(training)
        if variant.run != "eager" and mode != "decode" and not variant.liger:
            _compile_layers(self.model)
        if variant.run != "eager" and training:
            _compile_loss(self.model)

    def _adapt(self, variant: Variant, dropout: float, dtype: torch.dtype) -> nn.Module:
        options = {"lora_dropout": dropout} | ({"backend": variant.backend} if variant.backend else {})
        config = CONFIGS[variant.method](**options)
        ours = isinstance(config, malora.MaloraConfig)
        torch.manual_seed(0)
        # The paper's start takes a singular value decomposition a layer, minutes at 7B, and leaves B at zero, which no
        # trained adapter has: ours are made without values, and get random ones.
        model = get_peft_model(self.model, config, low_cpu_mem_usage=ours)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not ("lora_" in name or parameter.requires_grad or parameter.is_meta):
                    continue
                value = torch.empty(parameter.shape, dtype=dtype, device=self.device)
                keep = not parameter.is_meta and parameter.any()
                value = value.copy_(parameter) if keep else value.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        return model

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def load(self) -> None:
        self.kernels.__enter__()
        for tensor in self.own:
            tensor.data = tensor.data.to(self.device)

    def park(self) -> None:
        self.kernels.__exit__(None, None, None)
        for tensor in self.own:
            tensor.grad = None
            tensor.data = tensor.data.to("cpu")
        for module in self.model.modules():
            if isinstance(module, malora.MaloraLayer):
                module.group.release(include_frozen=True)


def _compile_loss(model: nn.Module) -> None:
    """Cross entropy in float32 as it comes writes the logits in float32, their softmax, and the gradients of both."""
    base = _base(model)
    base.loss_function = torch.compile(base.loss_function)


def _compile_layers(model: nn.Module) -> None:
    base = _base(model)
    for module in base.modules():
        if type(module).__name__ in base._no_split_modules:
            module.compile()


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
