"""Residual sum and RMSNorm in one kernel, alone and in a model.

It runs through Triton's interpreter or on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import malora
from malora.backbone import liger
from tests.bench.conftest import stand_in_for_liger
from tests.conftest import make_model

add_rms_norm = pytest.importorskip("malora.backbone.kernels.add_rms_norm").add_rms_norm
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.arange(1, 15, device=DEVICE).view(2, 7)


def reference(x, residual, weight, eps):
    return (total := x + residual), F.rms_norm(total, weight.shape, weight, eps)


@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 40), (1, 1), (3, 576)])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_results_and_gradients_equal_those_in_float64(shape, used):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(shape[-1], dtype=torch.float64, device=DEVICE) + 0.5
    grads = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    indices = {"both": [0, 1], "sum": [0], "norm": [1]}[used]

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        results = function(*leaves, weight.to(dtype), 1e-5)
        outputs, output_grads = [results[i] for i in indices], [grads[i].to(dtype) for i in indices]
        return [*results, *torch.autograd.grad(outputs, leaves, output_grads)]

    expected, got = run(reference, torch.float64), run(add_rms_norm, torch.float32)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a.float(), rtol=1e-4, atol=1e-5)


def test_the_norm_is_computed_from_the_rounded_sum():
    torch.manual_seed(0)
    x, residual = (torch.randn(50, 64, device=DEVICE).half() for _ in range(2))
    weight = torch.rand(64, device=DEVICE).half() + 0.5
    total, y = add_rms_norm(x, residual, weight, 1e-5)
    assert total.equal(x + residual)

    def share_that_differs(summed):
        return (y != F.rms_norm(summed, (64,), weight.float(), 1e-5).half()).float().mean()

    assert share_that_differs(total.float()) < 0.01 < share_that_differs(x.float() + residual.float())


def test_gradients_may_be_column_slices():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 48, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(48, device=DEVICE)
    slices = [torch.randn(2, 5, 70, device=DEVICE)[..., 16:64] for _ in range(2)]
    got = torch.autograd.grad(add_rms_norm(*inputs, weight, 1e-5), inputs, slices)
    expected = torch.autograd.grad(reference(*inputs, weight, 1e-5), inputs, slices)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)


@pytest.fixture
def with_kernels(monkeypatch):
    """Patch a model as with Liger installed.

    The norms that Liger replaces carry a mark.
    """

    def apply(model, **_):
        for norm in model.modules():
            if isinstance(norm, LlamaRMSNorm):
                norm.casting_mode = "llama"

    stand_in_for_liger(monkeypatch, apply)
    return liger.LigerKernels


@pytest.mark.parametrize("options", [{"lora_dropout": 0.0}, {"lora_dropout": 0.3, "backend": "fused"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_fused_norms_computes_the_same(checkpointing, options, with_kernels, monkeypatch):
    """With the fused backend the norms feed the kernels of the down projections."""

    def run(kernels):
        model = get_peft_model(make_model(), malora.METHODS["malora"](**options)).to(DEVICE).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "malora_B" in name:
                    p.normal_(generator=torch.Generator(DEVICE).manual_seed(1), std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if kernels:
            with_kernels(model.get_base_model())
        torch.manual_seed(0)  # one dropout mask for both
        logits = model(IDS).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, gradients = run(kernels=False)
    unfused = []
    monkeypatch.setattr(liger.F, "rms_norm", lambda *a, f=F.rms_norm: unfused.append(a) or f(*a))
    got, fused_gradients = run(kernels=True)
    # Of five norms, the first follows no sum. Checkpointed layers compute their own two norms once more when they are
    # recomputed.
    assert len(unfused) == (5 + 4 if checkpointing else 1)
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, msg=name)


def test_the_norm_is_computed_again_if_a_hook_changes_a_result_in_place(with_kernels):
    def logits(kernels):
        model = make_model().to(DEVICE).requires_grad_(False)
        if kernels:
            with_kernels(model)
        model.model.layers[0].register_forward_hook(lambda *call: call[-1].add_(0.1))
        return model(IDS).logits

    torch.testing.assert_close(logits(kernels=True), logits(kernels=False))


def test_a_norm_that_is_trained_is_not_fused(with_kernels):
    def gradients(kernels):
        model = make_model().to(DEVICE)
        if kernels:
            with_kernels(model)
        model(IDS).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if "norm" in name}

    expected, got = gradients(kernels=False), gradients(kernels=True)
    assert len(expected) == 5
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_an_interrupted_pass_leaves_no_result_behind(with_kernels):
    model = make_model().to(DEVICE).requires_grad_(False)
    kernels = with_kernels(model)
    following = model.model.layers[1].input_layernorm
    pending = []

    def interrupt(*_):
        pending.append(following.precomputed)
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), kernels:
        model(IDS)
    assert pending[0] is not None and following.precomputed is None
