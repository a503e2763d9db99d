"""Residual sums and norms as one kernel, through Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import malora
from malora.backbone import liger
from malora.fused.availability import interprets_triton
from malora.fused.kernels import down_forward
from tests.bench.conftest import stand_in_for_liger
from tests.conftest import make_model

norms = pytest.importorskip("malora.backbone.add_rms_norm")
CAN_FUSE = torch.cuda.is_available() or interprets_triton()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.arange(1, 15, device=DEVICE).view(2, 7)


def reference(x, residual, weight, eps):
    return (total := x + residual), F.rms_norm(total, weight.shape, weight, eps)


@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 40), (1, 1), (3, 576)])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_sum_norm_and_gradients_are_float64s(shape, used):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(shape[-1], dtype=torch.float64, device=DEVICE) + 0.5
    wanted = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    keep = {"both": [0, 1], "sum": [0], "norm": [1]}[used]

    def both(function, dtype):
        narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
        results = function(*narrow, weight.to(dtype), 1e-5)
        gradients = torch.autograd.grad([results[i] for i in keep], narrow, [wanted[i].to(dtype) for i in keep])
        return [*results, *gradients]

    expected, got = both(reference, torch.float64), both(norms.add_norm, torch.float32)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a.float(), rtol=1e-4, atol=1e-5)


def test_the_norm_is_that_of_the_rounded_sum():
    torch.manual_seed(0)
    x, residual = (torch.randn(50, 64, device=DEVICE).half() for _ in range(2))
    weight = torch.rand(64, device=DEVICE).half() + 0.5
    total, y = norms.add_norm(x, residual, weight, 1e-5)
    assert total.equal(x + residual)

    def differ(summed):
        return (y != F.rms_norm(summed, (64,), weight.float(), 1e-5).half()).float().mean()

    assert differ(total.float()) < 0.01 < differ(x.float() + residual.float())


def test_gradients_may_lie_in_wider_rows():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 48, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(48, device=DEVICE)
    wider = [torch.randn(2, 5, 70, device=DEVICE)[..., 16:64] for _ in range(2)]
    got = torch.autograd.grad(norms.add_norm(*inputs, weight, 1e-5), inputs, wider)
    expected = torch.autograd.grad(reference(*inputs, weight, 1e-5), inputs, wider)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)


@pytest.fixture
def with_kernels(monkeypatch):
    """The kernels around a model as with Liger, whose norms are known by a mark."""

    def apply(model, **_):
        for norm in model.modules():
            if isinstance(norm, LlamaRMSNorm):
                norm.casting_mode = "llama"

    stand_in_for_liger(monkeypatch, apply)
    return liger.LigerKernels


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_makes_its_sums_with_its_norms_and_computes_the_same(checkpointing, with_kernels, monkeypatch):
    def passed(kernels):
        model = get_peft_model(make_model(), malora.METHODS["malora"](lora_dropout=0.0)).to(DEVICE).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "malora_B" in name:
                    p.normal_(generator=torch.Generator(DEVICE).manual_seed(1), std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if kernels:
            with_kernels(model.get_base_model())
        logits = model(IDS).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, gradients = passed(kernels=False)
    apart = []
    monkeypatch.setattr(liger.F, "rms_norm", lambda *a, f=F.rms_norm: apart.append(a) or f(*a))
    got, joined = passed(kernels=True)
    # Of five norms the first has no sum before it. Checkpointed layers make their own two again in the backward pass.
    assert len(apart) == (5 + 4 if checkpointing else 1)
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined[name], gradient, msg=name)


@pytest.mark.skipif(not CAN_FUSE, reason="needs a GPU, or Triton's interpreter")
@pytest.mark.parametrize("method", ["malora", "asylora"])
def test_norms_are_made_where_siblings_want_their_input(method, with_kernels, monkeypatch):
    """From the second pass on, when weights have room; the first norm, which has no sum before it, is copied."""
    from malora.fused import augmented_weights

    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)
    copies = []
    down = down_forward.down_in_parts
    monkeypatch.setattr(
        down_forward, "dropout_matmul_split_k", lambda *a, f=down: copies.append(a[5] is not None) or f(*a)
    )

    def passed(kernels):
        options = {"lora_dropout": 0.3, "backend": "fused"}
        model = get_peft_model(make_model(), malora.METHODS[method](**options)).to(DEVICE).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "malora_B" in name:
                    p.normal_(generator=torch.Generator(DEVICE).manual_seed(1), std=0.1)
        if kernels:
            with_kernels(model.get_base_model())
        for seed in range(2):
            del copies[:]
            model.zero_grad()
            torch.manual_seed(seed)
            logits = model(IDS).logits
            logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, gradients = passed(kernels=False)
    assert copies == [True, True, False] * 2  # Q, K, V; Gate, Up; Down
    got, joined = passed(kernels=True)
    assert copies == [True, False, False] + [False] * 3
    torch.testing.assert_close(got, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined[name], gradient, msg=name)


def test_a_result_that_a_hook_changes_in_place_has_its_norm_made_anew(with_kernels):
    def logits(kernels):
        model = make_model().to(DEVICE).requires_grad_(False)
        if kernels:
            with_kernels(model)
        model.model.layers[0].register_forward_hook(lambda *call: call[-1].add_(0.1))
        return model(IDS).logits

    torch.testing.assert_close(logits(kernels=True), logits(kernels=False))


def test_a_norm_that_is_trained_stays_a_norm(with_kernels):
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


def test_a_pass_that_is_broken_off_leaves_nothing(with_kernels):
    model = make_model().to(DEVICE).requires_grad_(False)
    kernels = with_kernels(model)
    following = model.model.layers[1].input_layernorm
    left = []

    def interrupt(*_):
        left.append(following.made)
        raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), kernels:
        model(IDS)
    assert left[0] is not None and following.made is None
