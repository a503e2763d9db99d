"""What keeps a layer from the fused path: hooks on the frozen layer, which that path does not call."""

import pytest
import torch
from peft import get_peft_model

from malora import METHODS
from malora.fused.eligibility import reason_not_fused
from tests.conftest import make_model

pytest.importorskip("triton")


def q_proj(backend):
    model = get_peft_model(make_model(), METHODS["malora"](backend=backend, lora_dropout=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "malora_B" in name:
                parameter.normal_()
    return model, model.base_model.model.model.layers[1].self_attn.q_proj  # layer 0 passes no gradient on


def replace_forward(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


CHANGES = {
    "forward hook": lambda linear: linear.register_forward_hook(lambda module, args, y: 2 * y),
    "forward pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "other forward": replace_forward,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hook_on_the_frozen_layer_changes_the_output_as_on_any_backend(change, ids):
    outputs = []
    for backend in ("dense", "fused"):
        torch.manual_seed(0)
        model, layer = q_proj(backend)
        plain = model(input_ids=ids).logits
        change(layer.base_layer)
        outputs.append(model(input_ids=ids).logits)
        assert not torch.allclose(outputs[-1], plain, atol=1e-4)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_backward_hook_on_the_frozen_layer_runs(ids):
    model, layer = q_proj("fused")
    seen = []
    layer.base_layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [(*ids.shape, layer.out_features)]


def test_uniform_gates_over_a_subspace_are_no_work_for_the_kernels():
    for method, reason in {"molora": None, "malora": "uniform gates with down='P_t S'"}.items():
        config = METHODS[method](backend="fused", gating="uniform", top_k=8)
        layer = get_peft_model(make_model(), config).base_model.malora_layers[0]
        found = reason_not_fused(layer, [config], is_sharded=False)
        assert found == reason or (reason is None and found and "Triton" in found)


def test_a_removed_hook_gives_the_fused_path_back():
    _, layer = q_proj("fused")
    if layer.adapter_for_fused_path() is None:
        pytest.skip("needs a GPU, or Triton's interpreter")
    handle = layer.base_layer.register_forward_hook(lambda *call: None)
    assert layer.adapter_for_fused_path() is None
    handle.remove()
    assert layer.adapter_for_fused_path() == "default"
