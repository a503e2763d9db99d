"""Base and up side as one product, in weights with room for B: the same sums, and weights that can be had back."""

import copy

import pytest
import safetensors.torch
import torch
from peft import get_peft_model
from torch import nn

import malora
from malora.fused import augmented_weights
from malora.fused.availability import interprets_triton
from malora.fused.kernels import down_forward
from tests.malora.backends.test_backends import assert_agrees, layer
from tests.malora.fused.test_group import CLOSE, DEVICE, DTYPE, adapted

METHODS = ("asylora", "molora", "malora", "malora-small", "malora-fixed-s", "malora-unshared-s")
QKV, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)


@pytest.fixture(autouse=True)
def without_size_limit(monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)


@pytest.fixture
def ids(ids):
    return ids.to(DEVICE)


def rooms(model) -> dict[str, int]:
    """Columns that each weight has beside it."""
    found = {}
    for made in model.base_model.malora_layers:
        weight = made.base_layer.weight
        if room := weight.stride(0) - weight.shape[1]:
            found[made.name.rpartition(".")[2]] = room
    return found


def trained(model, ids, passes=1) -> dict[str, torch.Tensor]:
    """Logits and gradients of so many passes before one backward pass."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = torch.stack([model(ids.roll(n, 1), use_cache=False).logits for n in range(passes)])
    logits.pow(2).mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=name)


def pair(method="malora", **options):
    """Twice the same, of which one has no room."""
    models = [adapted(method, lora_dropout=0.3, **options) for _ in range(2)]
    for made in models[1].base_model.malora_layers:
        made.group.rooms = dict.fromkeys(map(id, made.group.layers), 0)
    return models


@pytest.mark.skipif(not interprets_triton(), reason="Triton runs on a CPU as its interpreter only")
@pytest.mark.parametrize(
    "method, options", [(m, {}) for m in METHODS] + [(m, {"num_experts": 3}) for m in METHODS[1:3]]
)
def test_agrees_with_the_reference(method, options):
    """With a bias too."""
    made = layer(malora.METHODS[method](lora_dropout=0.3, **options), m=152)
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
    places = {name: g + 1 for family in (QKV, GATE_UP) for g, name in enumerate(family)}
    assert rooms(models[0]) == {name: place * H for name, place in places.items()} and not rooms(models[1])


def test_gradient_checkpointing_recomputes_the_same(ids):
    model = adapted(lora_dropout=0.3)
    plain = trained(model, ids)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_close(trained(model, ids), plain)
    assert rooms(model)


def test_room_is_for_training_with_dropout_where_there_is_enough_to_gain(ids, monkeypatch):
    model = adapted()
    trained(model, ids)
    assert not rooms(model)
    model = adapted(lora_dropout=0.3).eval()
    trained(model, ids)
    assert not rooms(model)
    with torch.inference_mode():  # a weight of its own could not be trained with
        model.train()(ids)
    assert not rooms(model)
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 64 * 192)
    trained(model, ids)
    assert set(rooms(model)) == set(GATE_UP)


def test_weights_that_are_not_a_layers_alone_stay_where_they_are(ids):
    model, other = pair()
    attention, mlp = (getattr(model.base_model.model.model.layers[0], name) for name in ("self_attn", "mlp"))
    key, gate = attention.k_proj.base_layer, mlp.gate_proj.base_layer
    packed = torch.zeros(2 * 32, 64, dtype=DTYPE, device=DEVICE)
    packed[:32] = key.weight
    key.weight.data = packed[:32]
    gate._hf_hook = "accelerate brings the weight for each pass"
    expected = trained(other, ids)
    assert_close(trained(model, ids), expected)
    assert key.weight.data_ptr() == packed.data_ptr() and not packed[32:].any()
    first, second = (layer.parameters() for layer in model.base_model.model.model.layers)
    assert all(p.is_contiguous() for p in first)  # their siblings stay too: one product needs them all
    assert sum(not p.is_contiguous() for p in second) == 5


def test_a_weight_that_was_exchanged_is_computed_without_room(ids):
    model, other = pair()
    trained(model, ids)
    for each in (model, other):
        for made in each.base_model.malora_layers:
            made.base_layer.weight.data = 2 * made.base_layer.weight.data
    assert_close(trained(model, ids), trained(other, ids))
    assert not rooms(model) and not any(
        augmented_weights.whole(made) is not None for made in model.base_model.malora_layers
    )


def test_another_adapter_of_another_size_is_computed_without_room(ids):
    models = pair()
    trained(models[0], ids)
    before = rooms(models[0])
    for model in models:
        torch.manual_seed(0)
        model.add_adapter("second", malora.METHODS["molora"](backend="fused", lora_dropout=0.3, r=3))
        model.set_adapter("second")
        model.to(DEVICE, DTYPE)
    assert_close(*(trained(model, ids) for model in models))
    for model in models:
        model.set_adapter("default")
    assert_close(*(trained(model, ids) for model in models))
    assert rooms(models[0]) == before


def test_a_pass_of_both_adapters_in_turns(ids):
    """They write to the same room."""
    models = pair()
    for model in models:
        model.add_adapter("second", malora.METHODS["malora"](backend="fused", lora_dropout=0.3))
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
    assert rooms(models[0])


def test_weights_can_be_had_back(ids, tmp_path):
    model = adapted(lora_dropout=0.3)
    before = copy.deepcopy(model.state_dict())
    trained(model, ids)
    assert rooms(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    again = copy.deepcopy(model)
    assert not rooms(again)
    assert_close(trained(again, ids), trained(model, ids))
    torch.save(model, tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_close(trained(read, ids), trained(model, ids))
    model.add_adapter("second", malora.METHODS["malora"]())
    model.delete_adapter("second")
    assert rooms(model)
    model.delete_adapter("default")
    assert not rooms(model)
    plain = again.unload()
    assert all(p.is_contiguous() for p in plain.parameters())
    config = malora.METHODS["malora"](backend="fused", lora_dropout=0.3)
    wrapped = get_peft_model(plain, config).to(DEVICE, DTYPE).train()
    trained(wrapped, ids)
    assert rooms(wrapped)
    plain = wrapped.unload()
    plain.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, plain.state_dict()[name].cpu()), name
    assert isinstance(plain.model.layers[0].self_attn.q_proj, nn.Linear)


def readers(model):
    """Q, K and V of the first layer, and what they are called with, made where they have room."""
    attention = model.base_model.model.model.layers[0].self_attn
    torch.manual_seed(5)
    plain = torch.randn(2, 7, attention.q_proj.in_features, device=DEVICE, dtype=DTYPE)
    return [attention.q_proj, attention.k_proj, attention.v_proj], plain


def outputs(layers, x):
    torch.manual_seed(6)
    ys = [layer(x) for layer in layers]
    return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [layers[0].malora_S["default"], x])]


def test_an_input_that_has_room_is_not_copied(ids, monkeypatch):
    """But once only: a second pass over it would write over what the first has saved."""
    copies, down = [], down_forward.dropout_matmul_split_k
    monkeypatch.setattr(down_forward, "dropout_matmul_split_k", lambda *a: copies.append(a[5] is not None) or down(*a))
    model = adapted(lora_dropout=0.3)
    layers, plain = readers(model)
    assert augmented_weights.input_with_room(layers[0], plain) is None  # before weights have moved
    expected = outputs(layers, plain.requires_grad_())
    for taken in (False, True):
        x = augmented_weights.input_with_room(layers[0], plain).copy_(plain.detach()).requires_grad_()
        version = x._version
        if taken:
            layers[0](x)
        del copies[:]
        got = outputs(layers, x)
        assert copies == [taken] and x._version == version
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_an_input_that_has_room_and_changes_is_seen(ids):
    model = adapted(lora_dropout=0.3)
    layers, plain = readers(model)
    outputs(layers, plain.requires_grad_())
    x = augmented_weights.input_with_room(layers[0], plain).copy_(plain.detach())
    ys = [layer(x) for layer in layers]
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in ys).backward()


def test_room_of_another_dtype_than_autocasts_is_left(ids):
    """Products are in autocast's then, and the input is copied into it."""
    model = adapted(lora_dropout=0.3).float()
    layers, plain = readers(model)
    plain = plain.float()
    outputs(layers, plain.requires_grad_())
    x = augmented_weights.input_with_room(layers[0], plain).copy_(plain.detach()).requires_grad_()
    with torch.autocast(plain.device.type, torch.bfloat16):
        for got, expected in zip(outputs(layers, x), outputs(layers, plain), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("change", ["eval", "no dropout", "no gradients", "another width"])
def test_there_is_no_room_where_it_is_of_no_use(change, ids):
    model = adapted(lora_dropout=0.3)
    layers, plain = readers(model)
    outputs(layers, plain.requires_grad_())
    assert augmented_weights.input_with_room(layers[0], plain) is not None
    if change == "eval":
        model.eval()
    if change == "no dropout":
        layers[0].settings["default"].lora_dropout = 0.0
    with torch.set_grad_enabled(change != "no gradients"):
        like = plain[..., :8] if change == "another width" else plain
        assert augmented_weights.input_with_room(layers[0], like) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS[:3])
def test_a_graph_replays_what_a_pass_computes(method, ids):
    """It fills the room while it routes; with weights that an optimizer changed after the capture."""
    model, other = pair(method)
    trainable = [[p for p in each.parameters() if p.requires_grad] for each in (model, other)]
    dropout_seed = torch.full((1,), 5, device=DEVICE)

    def step(each, parameters):
        each.zero_grad()
        logits = each(ids, use_cache=False).logits
        return [logits, *torch.autograd.grad(logits.pow(2).mean(), parameters)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: dropout_seed)  # one mask for all
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(model, trainable[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, trainable[0])
        assert rooms(model)
        for factor in (1.0, 0.5):
            with torch.no_grad():
                for parameter in (*trainable[0], *trainable[1]):
                    parameter.mul_(factor)
            graph.replay()
            for got, expected in zip(captured, step(other, trainable[1]), strict=True):
                assert (got - expected).norm() < 1e-3 * expected.norm()
