"""Frozen maps beside adapted ones, with `backend="fp8"`: attention's outputs of a model."""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from torch import nn

from malora import METHODS, MaloraLayer
from malora.fused.availability import warn_once
from malora.fused.fp8_linear import Float8Linear
from tests.conftest import make_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 1e-2, "atol": 1e-2} if DEVICE == "cuda" else {}  # a GPU's 8-bit products give bfloat16


def adapted(backend="fp8", **options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), METHODS["malora"](backend=backend, **options)).to(DEVICE).eval()


def outputs(model) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("o_proj")]


def in_8_bits(x):
    """To 8 bits and back, a scale a row."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def test_attentions_outputs_are_in_8_bits_and_are_plain_maps_in_all_else():
    model, plain = adapted(), adapted("fused")
    assert {type(module) for module in outputs(model)} == {Float8Linear}
    assert {type(module) for module in outputs(plain)} == {nn.Linear}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model.get_output_embeddings()) is nn.Linear
    o_proj = outputs(model)[0]
    x = torch.randn(3, 5, o_proj.in_features, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(y := o_proj(x), x, dy := torch.randn_like(x))
    W = o_proj.weight.detach()
    torch.testing.assert_close(y, in_8_bits(x) @ in_8_bits(W).T, **CLOSE)
    torch.testing.assert_close(dx, in_8_bits(dy) @ in_8_bits(W.T).T, **CLOSE)
    assert not torch.equal(y, nn.functional.linear(x, W))


def test_without_the_adapter_the_model_is_as_it_came(ids):
    model, ids = adapted(), ids.to(DEVICE)
    with torch.no_grad():
        expected = make_model().to(DEVICE).eval()(ids).logits
        adapted_ = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, adapted_) and not torch.equal(adapted_, expected)
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, adapted_, **CLOSE)
        model.delete_adapter("default")
        assert torch.equal(model.base_model.model(ids).logits, expected)


@pytest.mark.parametrize("leave, method", [("unload", "malora"), ("merge_and_unload", "asylora")])
def test_a_model_that_is_left_has_plain_maps(leave, method, ids):
    model = get_peft_model(make_model(), METHODS[method](backend="fp8")).to(DEVICE)
    families = {layer.group for layer in model.base_model.malora_layers}
    with torch.no_grad():
        model(ids.to(DEVICE))
    assert any((id(outputs(model)[0]), 0) in family.frozen for family in families)
    left = getattr(model, leave)()
    assert {type(module) for module in outputs(left)} == {nn.Linear}
    assert not any("_adapted" in vars(module) for module in left.modules())
    assert not any(family.frozen for family in families)


def test_copies_and_saved_models_are_neighbours_of_their_own_layers(ids):
    model, file = adapted(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(ids.to(DEVICE)).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            layers = {id(module) for module in other.modules() if isinstance(module, MaloraLayer)}
            assert all(id(module._adapted[0]) in layers for module in outputs(other))
            assert torch.equal(other(ids.to(DEVICE)).logits, expected)


def test_what_trains_is_computed_in_full():
    model = adapted()
    o_proj = outputs(model)[0]
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    o_proj.weight.requires_grad_()
    assert torch.equal(o_proj(x), nn.functional.linear(x, o_proj.weight))
    saved = adapted(modules_to_save=["o_proj"])
    assert not any(type(module) is Float8Linear for module in saved.modules())
    model.add_adapter("second", METHODS["malora"](backend="fp8", modules_to_save=["o_proj"]))
    assert not any(type(module) is Float8Linear for module in model.modules())


def test_they_take_what_linear_maps_take():
    o_proj = outputs(adapted())[0]
    x = torch.randn(2, 3, o_proj.in_features, device=DEVICE)
    expected = o_proj(x)
    assert torch.equal(o_proj(input=x), expected) and o_proj(x[:0]).shape == (0, 3, o_proj.out_features)
    assert o_proj(x[0, 0]).shape == (o_proj.out_features,)
    torch.testing.assert_close(o_proj(x[0, 0]), expected[0, 0], **CLOSE)


def test_a_forward_that_somebody_keeps_or_has_exchanged_is_let_be(caplog):
    model = adapted()
    kept = outputs(model)[0].forward  # as accelerate's hooks do
    left = model.unload()
    x = torch.randn(2, 64, device=DEVICE)
    assert torch.equal(kept(x), nn.functional.linear(x, outputs(left)[0].weight))
    for module in outputs(left):
        module.forward = module.forward
    warn_once.cache_clear()
    again = get_peft_model(left, METHODS["malora"](backend="fp8"))
    assert {type(module) for module in outputs(again)} == {nn.Linear}
    assert caplog.text.count("'fp8' cannot compute a frozen map whose forward was exchanged; that does.") == 1


def test_any_adapter_of_the_parent_makes_them_neighbours():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", METHODS["malora"](backend="fp8", target_modules=["v_proj"]))
    model.add_adapter("exact", METHODS["malora"](backend="fused", target_modules=["v_proj"]))
    o_proj = outputs(model)[0]
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    exact = nn.functional.linear(x, o_proj.weight)
    quantize_rows = {}
    for adapter in ("default", "second", "exact"):
        model.set_adapter(adapter)
        quantize_rows[adapter] = not torch.equal(o_proj(x), exact)
    assert quantize_rows == {"default": True, "second": True, "exact": False}


def test_a_head_is_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    config = METHODS["malora"](backend="fp8", target_modules=["0"], task_type=None)
    assert type(get_peft_model(model, config).base_model.model[1]) is nn.Linear


def test_a_second_adapter_may_target_them():
    model = adapted()
    o_proj, family = outputs(model)[0], model.base_model.malora_layers[0].group
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    o_proj(x)
    assert (id(o_proj), 0) in family.frozen
    model.add_adapter("second", METHODS["malora"](backend="fp8", target_modules=["o_proj"]))
    assert {type(module) for module in outputs(model)} == {MaloraLayer}
    assert {type(module.base_layer) for module in outputs(model)} == {nn.Linear}
    assert (id(o_proj), 0) not in family.frozen
    assert torch.equal(outputs(model)[0](x), o_proj(x))  # the first adapter is active
