"""Base and up projection as one GEMM.

The sums are the same, the GEMM is used only when asked for, and weights can be restored.
"""

import copy

import pytest
import safetensors.torch
import torch
from peft import get_peft_model
from torch import nn

import malora
from malora.fused import augmented_weights
from malora.fused.availability import interprets_triton
from tests.conftest import optimize_adapted_layers
from tests.malora.backends.test_backends import assert_agrees, layer
from tests.malora.fused.test_group import BOTH_LAYERS, CLOSE, DEVICE, DTYPE, FEW_EXPERTS, adapted

ONE_LAYER = {"lora_dropout": 0.3, "layers_to_transform": [0]}  # the interpreter is slow
METHODS = ("asylora", "molora", "malora", "malora-small", "malora-fixed-s", "malora-unshared-s")
QKV, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)


@pytest.fixture(autouse=True)
def without_size_limit(monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)


@pytest.fixture
def ids(ids):
    return ids.to(DEVICE)


def padding(model) -> dict[str, int]:
    """Return the padded columns of each weight that has any."""
    found = {}
    for made in model.base_model.malora_layers:
        weight = made.base_layer.weight
        if columns := weight.stride(0) - weight.shape[1]:
            found[made.name.rpartition(".")[2]] = columns
    return found


def trained(model, ids, passes=1) -> dict[str, torch.Tensor]:
    """Return logits and gradients of several forward passes and one backward pass."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = torch.stack([model(ids.roll(n, 1), use_cache=False).logits for n in range(passes)])
    logits.pow(2).mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=name)


def optimized(method="malora", **options):
    """Return an adapted model with padded columns."""
    model = adapted(method, **ONE_LAYER | options)
    optimize_adapted_layers(model)
    return model


def pair(method="malora", **options):
    """Return the same model twice, the first with padded columns."""
    return [optimized(method, **options), adapted(method, **ONE_LAYER | options)]


@pytest.mark.skipif(not interprets_triton(), reason="Triton runs on a CPU as its interpreter only")
@pytest.mark.parametrize(
    "method, options", [(m, {}) for m in METHODS] + [(m, {"num_experts": 3}) for m in METHODS[1:3]]
)
def test_agrees_with_the_reference(method, options):
    """The layer has a bias."""
    made = layer(malora.METHODS[method](lora_dropout=0.3, backend="fused", **options), m=152)
    optimize_adapted_layers(made)
    assert_agrees(made, "fused", torch.randn(3, 11, 72, dtype=torch.float64))
    config = made.settings["default"]
    assert made.base_layer.weight.stride(0) == 72 + -(-config.num_experts * config.r // 8) * 8


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_model_computes_the_same_and_sees_what_an_optimizer_did(method, ids):
    models = pair(method)
    for _ in range(2):
        assert_close(*(trained(model, ids, passes=2) for model in models))
        for model in models:
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    config = models[0].peft_config["default"]
    H = -(-config.num_experts * config.r // 8) * 8
    places = {name: g + 1 for group in (QKV, GATE_UP) for g, name in enumerate(group)}
    assert padding(models[0]) == {name: place * H for name, place in places.items()} and not padding(models[1])


def test_gradient_checkpointing_recomputes_the_same(ids):
    model = optimized()
    plain = trained(model, ids)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_close(trained(model, ids), plain)
    assert padding(model)


def test_nothing_moves_unless_the_user_asks(ids):
    model = adapted(**ONE_LAYER)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    trained(model, ids)
    with torch.no_grad():
        model.eval()(ids)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before and not padding(model)


def test_padding_is_for_dropout_and_for_large_groups(monkeypatch):
    assert not padding(optimized(lora_dropout=0.0))
    with torch.inference_mode():  # a weight of its own could not be trained with
        assert not padding(optimized())
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 64 * 192)
    assert set(padding(optimized())) == set(GATE_UP)


def test_the_backbone_is_restored(ids):
    model, plain = pair()
    before = trained(model, ids)
    optimize_adapted_layers(model)  # again changes nothing
    assert padding(model)
    malora.restore_backbone(model)
    assert not padding(model) and all(p.is_contiguous() for p in model.parameters())
    assert_close(trained(model, ids), trained(plain, ids))
    optimize_adapted_layers(model)
    assert padding(model)
    assert_close(trained(model, ids), before)
    malora.release_caches(model)
    assert not padding(model)


def test_weights_that_are_not_a_layers_alone_stay_where_they_are(ids):
    model, other = (adapted(lora_dropout=0.3, **BOTH_LAYERS) for _ in range(2))
    attention, mlp = (getattr(model.base_model.model.model.layers[0], name) for name in ("self_attn", "mlp"))
    key, gate = attention.k_proj.base_layer, mlp.gate_proj.base_layer
    packed = torch.zeros(2 * 32, 64, dtype=DTYPE, device=DEVICE)
    packed[:32] = key.weight
    key.weight.data = packed[:32]
    for each in (gate, other.base_model.model.model.layers[0].mlp.gate_proj.base_layer):
        each._hf_hook = "accelerate brings the weight for each pass"
    optimize_adapted_layers(model)
    expected = trained(other, ids)
    assert_close(trained(model, ids), expected)
    assert key.weight.data_ptr() == packed.data_ptr() and not packed[32:].any()
    first, second = (layer.parameters() for layer in model.base_model.model.model.layers)
    assert all(p.is_contiguous() for p in first)  # the rest of their groups stays too: one input feeds all
    assert sum(not p.is_contiguous() for p in second) == 5


def test_a_weight_that_was_exchanged_is_computed_without_padding(ids):
    model, other = pair()
    trained(model, ids)
    for each in (model, other):
        for made in each.base_model.malora_layers:
            made.base_layer.weight.data = 2 * made.base_layer.weight.data
    assert_close(trained(model, ids), trained(other, ids))
    assert not padding(model)


def test_an_adapter_of_another_size_is_computed_without_padding(ids):
    models = pair()
    trained(models[0], ids)
    before = padding(models[0])
    for model in models:
        torch.manual_seed(0)
        options = {"lora_dropout": 0.3, "r": 3, "num_experts": FEW_EXPERTS, "layers_to_transform": [0]}
        model.add_adapter("second", malora.METHODS["molora"](backend="fused", **options))
        model.set_adapter("second")
        model.to(DEVICE, DTYPE)
    assert_close(*(trained(model, ids) for model in models))
    for model in models:
        model.set_adapter("default")
    assert_close(*(trained(model, ids) for model in models))
    assert padding(models[0]) == before


def test_a_pass_of_both_adapters_in_turns(ids):
    """They write to the same padded columns."""
    models = pair()
    for model in models:
        model.add_adapter("second", malora.METHODS["malora"](backend="fused", num_experts=FEW_EXPERTS, **ONE_LAYER))
        model.to(DEVICE, DTYPE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "second" in name:
                    parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))

    def in_turns(model):
        torch.manual_seed(3)
        found = []
        for adapter in ("default", "second", "default"):
            model.set_adapter(adapter)
            found.append(model(ids).logits)
        sum(logits.pow(2).mean() for logits in found).backward()
        return {str(n): logits for n, logits in enumerate(found)} | {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    assert_close(*map(in_turns, models))
    assert padding(models[0])


def test_weights_are_saved_copied_and_unloaded_without_padding(ids, tmp_path):
    model = adapted(**ONE_LAYER)
    before = copy.deepcopy(model.state_dict())
    optimize_adapted_layers(model)
    trained(model, ids)
    assert padding(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    again = copy.deepcopy(model)
    assert not padding(again)
    assert_close(trained(again, ids), trained(model, ids))
    torch.save(model, tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_close(trained(read, ids), trained(model, ids))
    model.add_adapter("second", malora.METHODS["malora"]())
    model.delete_adapter("second")
    assert padding(model)
    model.delete_adapter("default")
    assert not padding(model)
    plain = again.unload()
    assert all(p.is_contiguous() for p in plain.parameters())
    config = malora.METHODS["malora"](backend="fused", num_experts=FEW_EXPERTS, **ONE_LAYER)
    wrapped = get_peft_model(plain, config).to(DEVICE, DTYPE).train()
    optimize_adapted_layers(wrapped)
    trained(wrapped, ids)
    assert padding(wrapped)
    plain = wrapped.unload()
    plain.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, plain.state_dict()[name].cpu()), name
    assert isinstance(plain.model.layers[0].self_attn.q_proj, nn.Linear)


def test_a_model_that_never_ran_is_unloaded_without_padding():
    model = optimized()
    assert any(not p.is_contiguous() for p in model.parameters())
    assert all(p.is_contiguous() for p in model.unload().parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS[:3])
def test_a_graph_replays_what_a_pass_computes(method, ids):
    """Compare the replays of a graph with passes of another model.

    The graph writes the up projection while it routes. An optimizer changes weights after the capture.
    """
    model, other = pair(method)
    trainable = [[p for p in each.parameters() if p.requires_grad] for each in (model, other)]
    dropout_seed = torch.full((1,), 5, device=DEVICE)

    def step(each, parameters):
        each.zero_grad()
        logits = each(ids, use_cache=False).logits
        return [logits, *torch.autograd.grad(logits.pow(2).mean(), parameters)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: dropout_seed)  # one dropout mask for all
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(model, trainable[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, trainable[0])
        assert padding(model)
        for factor in (1.0, 0.5):
            with torch.no_grad():
                for parameter in (*trainable[0], *trainable[1]):
                    parameter.mul_(factor)
            graph.replay()
            for got, expected in zip(captured, step(other, trainable[1]), strict=True):
                assert (got - expected).norm() < 1e-3 * expected.norm()
