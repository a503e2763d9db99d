"""Small models for the tests of checkpointing, and what they are compared by."""

from types import MethodType

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef

import malora
from malora.backbone.recompute import note
from tests.conftest import make_model

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
# A projection group of two, and the last projection of a layer. Kernels are interpreted, so fewer are faster.
TARGETS = ["q_proj", "v_proj", "down_proj"]
MODES = ("full", "offload", "lean")


def adapted(method="malora", **options):
    torch.manual_seed(0)
    options = {"lora_dropout": 0.3, "target_modules": TARGETS} | options
    model = get_peft_model(make_model(), malora.METHODS[method](**options)).to(DEVICE, DTYPE).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_" in name or "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    return model


def set_mode(model, mode, offload_fraction=1.0):
    malora.set_checkpointing(model, mode, offload_fraction=offload_fraction if mode == "lean" else None)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model, ids, seed=3):
    torch.manual_seed(seed)
    loss = loss_of(model, ids)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def assert_equal(got, expected):
    """Bit for bit, except that kernels on a GPU may add in another order."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3 * ON_GPU, atol=1e-5 * ON_GPU, msg=name)


def counted(calls, name, function):
    def wrapper(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return wrapper


def norms_and_swiglu_that_announce(model):
    """Replace a Llama model's norms and activation functions by ones that `note` their outputs.

    Returns the list that gets a reference to the memory of each such output.
    """
    outputs = []

    def rms_norm(x, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    def swiglu(gate, up):
        return SwiGlu.apply(gate, up)

    class SwiGlu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, dy)

    def announced(function, *inputs):
        y = function(*inputs)
        note(y, function, *inputs)
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(lambda self, x: announced(rms_norm, x, self.weight), module)
        if type(module).__name__ == "LlamaMLP":
            module.forward = MethodType(
                lambda self, x: self.down_proj(announced(swiglu, self.gate_proj(x), self.up_proj(x))), module
            )
    return outputs
