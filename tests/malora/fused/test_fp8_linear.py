"""Un-adapted frozen linear layers with `backend="fp8"`.

They are the output projections of attention.
"""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from torch import nn

from malora import METHODS, MaloraLayer, restore_backbone
from malora.fused.availability import warn_once
from malora.fused.fp8_linear import Float8Linear
from tests.conftest import make_model, optimize_adapted_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 1e-2, "atol": 1e-2} if DEVICE == "cuda" else {}  # float8 matmuls of a GPU give bfloat16


def adapted(backend="fp8", **options):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), METHODS["malora"](backend=backend, **options)).to(DEVICE).eval()
    optimize_adapted_layers(model)
    return model


def outputs(model) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("o_proj")]


def in_float8(x):
    """Quantize to float8 and back, with one scale per row."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def test_no_class_changes_unless_the_user_asks(ids):
    model = get_peft_model(make_model(), METHODS["malora"](backend="fp8")).to(DEVICE)
    model(ids.to(DEVICE), labels=ids.to(DEVICE)).loss.backward()
    assert {type(module) for module in outputs(model)} == {nn.Linear}
    optimize_adapted_layers(model)
    assert {type(module) for module in outputs(model)} == {Float8Linear} and "Float8Linear(" in str(model)
    restore_backbone(model)
    assert {type(module) for module in outputs(model)} == {nn.Linear}


def test_output_projections_are_in_float8_and_plain_linear_layers_otherwise():
    model, plain = adapted(), adapted("fused")
    assert {type(module) for module in outputs(model)} == {Float8Linear}
    assert {type(module) for module in outputs(plain)} == {nn.Linear}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model.get_output_embeddings()) is nn.Linear
    o_proj = outputs(model)[0]
    x = torch.randn(3, 5, o_proj.in_features, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(y := o_proj(x), x, dy := torch.randn_like(x))
    W = o_proj.weight.detach()
    torch.testing.assert_close(y, in_float8(x) @ in_float8(W).T, **CLOSE)
    torch.testing.assert_close(dx, in_float8(dy) @ in_float8(W.T).T, **CLOSE)
    assert not torch.equal(y, nn.functional.linear(x, W))


def test_without_the_adapter_the_model_is_unchanged(ids):
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
def test_an_unloaded_model_has_plain_linear_layers(leave, method, ids):
    model = get_peft_model(make_model(), METHODS[method](backend="fp8")).to(DEVICE)
    optimize_adapted_layers(model)
    groups = {layer.group for layer in model.base_model.malora_layers}
    with torch.no_grad():
        model(ids.to(DEVICE))
    assert any((id(outputs(model)[0]), 0) in group.cache.float8 for group in groups)
    left = getattr(model, leave)()
    assert {type(module) for module in outputs(left)} == {nn.Linear}
    assert not any("_groups" in vars(module) for module in left.modules())
    assert not any(group.cache.float8 for group in groups)


def test_attributes_of_other_modules_stay():
    """`MaloraModel` has a `_groups` too."""
    model = adapted()
    mlp = model.base_model.model.model.layers[0].mlp
    mlp._groups = 4
    restore_backbone(model)
    assert mlp._groups == 4 and model.unload().model.layers[0].mlp._groups == 4


def test_copied_and_saved_models_refer_to_their_own_layers(ids):
    model, file = adapted(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(ids.to(DEVICE)).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            layers = {id(module) for module in other.modules() if isinstance(module, MaloraLayer)}
            assert all(id(module._groups[0].layers[0]) in layers for module in outputs(other))
            assert torch.equal(other(ids.to(DEVICE)).logits, expected)


def test_a_trained_layer_is_computed_in_full():
    model = adapted()
    o_proj = outputs(model)[0]
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    o_proj.weight.requires_grad_()
    assert torch.equal(o_proj(x), nn.functional.linear(x, o_proj.weight))
    saved = adapted(modules_to_save=["o_proj"])
    assert not any(type(module) is Float8Linear for name, module in saved.named_modules() if "modules_to_save" in name)
    x = torch.randn(2, 64, device=DEVICE)
    assert torch.equal(outputs(saved)[0](x), nn.functional.linear(x, outputs(saved)[0].weight))
    model.add_adapter("second", METHODS["malora"](backend="fp8", modules_to_save=["o_proj"]))
    assert not any(type(module) is Float8Linear for module in model.modules())


def test_they_take_what_linear_layers_take():
    o_proj = outputs(adapted())[0]
    x = torch.randn(2, 3, o_proj.in_features, device=DEVICE)
    expected = o_proj(x)
    assert torch.equal(o_proj(input=x), expected) and o_proj(x[:0]).shape == (0, 3, o_proj.out_features)
    assert o_proj(x[0, 0]).shape == (o_proj.out_features,)
    torch.testing.assert_close(o_proj(x[0, 0]), expected[0, 0], **CLOSE)


def test_a_forward_that_was_kept_or_replaced_still_works(caplog):
    model = adapted()
    kept = outputs(model)[0].forward  # as accelerate's hooks do
    left = model.unload()
    x = torch.randn(2, 64, device=DEVICE)
    assert torch.equal(kept(x), nn.functional.linear(x, outputs(left)[0].weight))
    for module in outputs(left):
        module.forward = module.forward
    warn_once.cache_clear()
    again = get_peft_model(left, METHODS["malora"](backend="fp8"))
    optimize_adapted_layers(again)
    assert {type(module) for module in outputs(again)} == {nn.Linear}
    assert caplog.text.count("'fp8' cannot compute a frozen linear layer whose forward was replaced; that does.") == 1


def test_they_follow_the_active_adapter_of_their_parent():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("second", METHODS["malora"](backend="fp8", target_modules=["v_proj"]))
    model.add_adapter("exact", METHODS["malora"](backend="fused", target_modules=["v_proj"]))
    optimize_adapted_layers(model)
    o_proj = outputs(model)[0]
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    exact = nn.functional.linear(x, o_proj.weight)
    quantized = {}
    for adapter in ("default", "second", "exact"):
        model.set_adapter(adapter)
        quantized[adapter] = not torch.equal(o_proj(x), exact)
    assert quantized == {"default": True, "second": True, "exact": False}


def test_a_head_is_not_converted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    config = METHODS["malora"](backend="fp8", target_modules=["0"], task_type=None)
    model = get_peft_model(model, config)
    optimize_adapted_layers(model)
    assert type(model.base_model.model[1]) is nn.Linear


def test_a_part_of_a_model_is_optimized():
    model = get_peft_model(make_model(), METHODS["malora"](backend="fp8")).to(DEVICE)
    attention = model.base_model.model.model.layers[0].self_attn
    optimize_adapted_layers(attention.q_proj)  # has no other linear layers next to it
    assert type(attention.q_proj.base_layer) is nn.Linear and type(attention.o_proj) is nn.Linear
    optimize_adapted_layers(attention)
    assert [type(module) for module in outputs(model)] == [Float8Linear, nn.Linear]


def test_a_second_adapter_may_target_them():
    model = adapted()
    o_proj, cache = outputs(model)[0], model.base_model.malora_layers[0].group.cache
    x = torch.randn(2, o_proj.in_features, device=DEVICE)
    o_proj(x)
    assert (id(o_proj), 0) in cache.float8
    model.add_adapter("second", METHODS["malora"](backend="fp8", target_modules=["o_proj"]))
    assert {type(module) for module in outputs(model)} == {MaloraLayer}
    assert {type(module.base_layer) for module in outputs(model)} == {nn.Linear}
    assert (id(o_proj), 0) not in cache.float8
    assert torch.equal(outputs(model)[0](x), o_proj(x))  # the first adapter is active
