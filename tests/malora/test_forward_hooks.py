"""The hooks around a forward pass of the base model: routing is recorded whoever calls the model, and how."""

import copy
import io

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

import malora
from malora.forward_hooks import ForwardHooks
from tests.conftest import make_model


def adapted(method="malora", **options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), malora.METHODS[method](lora_dropout=0.0, **options))


def injected(method="malora"):
    torch.manual_seed(0)
    return inject_adapter_in_model(malora.METHODS[method](lora_dropout=0.0), make_model())


def test_routing_is_recorded_whoever_calls_the_model(ids):
    model = adapted()
    model(ids)
    expected = malora.balance_loss(model)
    for other, call in (
        (adapted(task_type=None), lambda m: m(ids)),
        (adapted(), lambda m: m.base_model(ids)),
        (adapted(), lambda m: m.get_base_model()(ids)),
        (injected(), lambda m: m(ids)),
        (injected(), lambda m: m(input_ids=ids)),
    ):
        call(other)
        torch.testing.assert_close(malora.balance_loss(other), expected)
        assert len(malora.router_stats(other)) == 12


@pytest.mark.parametrize("by_name", [True, False])
def test_the_padding_mask_is_found_by_name_and_by_position(ids, by_name):
    model, mask = injected(), torch.ones_like(ids)
    mask[0, 5:] = 0
    model(ids, attention_mask=mask) if by_name else model(ids, mask)
    assert ForwardHooks.on(model).log.attention_mask is mask
    model(ids)
    assert ForwardHooks.on(model).log.attention_mask is None


def test_a_second_adapter_shares_the_hooks(ids):
    model = injected()
    inject_adapter_in_model(malora.METHODS["molora"](), model, adapter_name="second")
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    for layer in (m for m in model.modules() if isinstance(m, malora.MaloraLayer)):
        layer.set_adapter(["default", "second"])
    model(ids)
    assert all(len(routings) == 2 for routings in ForwardHooks.on(model).log.routings.values())


def test_a_part_of_the_model_can_be_called_and_read_by_itself(ids):
    model = adapted()
    model(ids)
    decoder = model.get_base_model().model
    expected = malora.balance_loss(model)
    torch.testing.assert_close(malora.balance_loss(decoder), expected)
    assert list(malora.router_stats(decoder.layers[1].mlp)) == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    decoder(ids[:, :4])  # the base model's own forward does not run
    torch.testing.assert_close(malora.balance_loss(model), expected)


def test_a_layer_outlives_its_model(ids):
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    assert layer.routing_log is None and layer.routings == {}
    assert layer(torch.ones(1, 3, layer.in_features)).shape == (1, 3, layer.out_features)


def test_recording_ends_with_an_exception(ids):
    model = injected()

    def raises(*_):
        raise RuntimeError("broken off")

    handle = model.model.layers[1].register_forward_pre_hook(raises)
    with pytest.raises(RuntimeError, match="broken off"):
        model(ids)
    handle.remove()
    hooks = ForwardHooks.on(model)
    assert not hooks.log.recording
    model(ids)
    assert len(hooks.log.routings) == 12


@pytest.mark.parametrize("make", [adapted, injected])
def test_a_copy_records_for_itself(ids, make):
    model = make().train()
    model(ids)
    expected = malora.balance_loss(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with pytest.raises(ValueError, match="run a forward pass first"):
            malora.balance_loss(again)
        again(ids[:, :4])
        torch.testing.assert_close(malora.balance_loss(model), expected)
        assert malora.balance_loss(again) != expected


def test_a_model_without_adapters_has_no_hooks():
    for remove in (lambda m: m.unload(), lambda m: m.merge_and_unload()):
        base = remove(adapted("asylora"))
        assert not base._forward_pre_hooks and not base._forward_hooks


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_records_too(ids, fullgraph):
    model = adapted(target_modules=["q_proj", "v_proj"])  # tracing takes time per layer
    model(ids)
    expected = malora.balance_loss(model)
    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=fullgraph)(ids)
    torch.testing.assert_close(malora.balance_loss(model), expected)
    torch._dynamo.reset()
