"""Projection groups inside whole models: nothing but the speed may change."""

import copy

import pytest
import torch
from peft import get_peft_model

import malora
from tests.conftest import SHAPES, make_model, optimize_adapted_layers

# The interpreter computes in float64; a GPU's tensor cores do not.
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
CLOSE = {"rtol": 1e-3, "atol": 1e-5} if ON_GPU else {"rtol": 1e-8, "atol": 1e-10}
METHODS = ("molora", "malora", "asylora", "malora-fixed-s")
# The interpreter's time grows with the number of experts and of adapted layers. Inputs of a model's first adapted layer
# need no gradients, so tests of these adapt both layers.
FEW_EXPERTS = 4  # half of the default
BOTH_LAYERS = {"layers_to_transform": None}


@pytest.fixture
def ids(ids):
    return ids.to(DEVICE)


def adapted(method="malora", shape="llama", **options):
    """Return a model in training mode, with few experts if the method has several, in the last of two layers."""
    torch.manual_seed(0)
    targets = {"target_modules": malora.TARGET_MODULES[shape], "layers_to_transform": [1]}
    options = {"backend": "fused", "lora_dropout": 0.0} | targets | options
    options.setdefault("num_experts", min(FEW_EXPERTS, malora.METHODS[method]().num_experts))
    model = get_peft_model(make_model(shape), malora.METHODS[method](**options)).to(DEVICE, DTYPE).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    return model


def computed(model, ids, backend, more=malora.balance_loss):
    """Return logits, and gradients of a loss that includes `more` of a routed model."""
    for layer in model.base_model.malora_layers:
        layer.settings["default"].backend = backend
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    loss = logits.pow(2).mean()
    if malora.has_router(model):
        loss = loss + more(model)
    loss.backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ids, **loss):
    expected, got = computed(model, ids, "dense", **loss), computed(model, ids, "fused", **loss)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_computes_the_same(method, shape, ids):
    """With all experts in the first of the shapes."""
    options = {"num_experts": malora.METHODS[method]().num_experts} if shape == "llama" else {}
    assert_same(adapted(method, shape, **BOTH_LAYERS, **options), ids)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("frozen", ["malora_B", "malora_"])
def test_layers_of_a_group_need_not_train_alike(frozen, large, ids, monkeypatch):
    monkeypatch.setattr("malora.fused.streams.MIN_SATURATING_ELEMENTS", 1 if large else 1 << 23)
    model = adapted()
    for name, parameter in model.named_parameters():
        if "q_proj" in name and frozen in name:
            parameter.requires_grad_(False)
    assert_same(model, ids)
    assert not any(p.grad is not None for n, p in model.named_parameters() if "q_proj" in n and frozen in n)
    assert all(p.grad is not None for n, p in model.named_parameters() if "k_proj" in n and "malora_B" in n)


def test_a_group_is_computed_once(ids, monkeypatch):
    from malora.fused import autograd

    sizes, forward = [], autograd.forward_group
    monkeypatch.setattr(autograd, "forward_group", lambda a, x: sizes.append(len(a.layers)) or forward(a, x))
    adapted(**BOTH_LAYERS)(ids)
    assert sizes == [3, 2, 1] * 2  # Q, K, V; Gate, Up; Down; of two layers


def test_a_training_pass_packs_all_weights_at_once(ids, monkeypatch):
    sizes = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: sizes.append(len(to)) or copy(to, source))
    monkeypatch.setattr("malora.fused.kernels.multi_copy.MIN_TENSORS", 99)  # more would be one kernel of ours on a GPU
    model = adapted("molora", **BOTH_LAYERS)  # a router, A and B in each of six targets of two layers
    model(ids)
    assert sizes == [9, 6, 3] * 2
    del sizes[:]
    model(ids)
    assert sizes == [36]


def test_the_gradients_of_a_balance_loss_are_read_in_place(ids, monkeypatch):
    def computed():
        """Return gradients, and how many tensors each call of torch.stack copied."""
        model, copied = adapted("molora", **BOTH_LAYERS), []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "stack", lambda tensors: copied.append(len(tensors)) or stack(tensors))
            (model(ids).logits.sum() + malora.balance_loss(model)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, copied

    stack = torch.stack
    got, copied = computed()
    assert not {2, 3} & set(copied)  # Gate, Up and Q, K, V
    monkeypatch.setattr("malora.fused.autograd._lie_stacked", lambda _: False)
    expected, copied = computed()
    assert copied.count(3) == copied.count(2) == 2  # of two layers
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def test_a_balance_loss_of_one_layer_of_a_group(ids):
    def of_key(model):
        return model.base_model.model.model.layers[1].self_attn.k_proj.routings["default"].probability.pow(2).sum()

    assert_same(adapted(), ids, more=of_key)


@pytest.mark.parametrize("method", [*METHODS, "malora-small"])
def test_saved_tensors_may_be_packed_by_hooks(method, ids):
    """As hooks that offload them do; they come back without padded rows."""
    model = adapted(method)

    def gradients(pack):
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, use_cache=False).logits.pow(2).mean()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(lambda tensor: tensor)
    got = gradients(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_step_is_seen(fused, ids):
    """A fused optimizer does not increase the version of what it changes."""
    model = adapted(**BOTH_LAYERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(2):
        assert_same(model, ids)
        optimizer.step()
    with torch.no_grad():
        before = model.eval()(ids).logits
        optimizer.step()
        after = model.train().eval()(ids).logits
        assert not torch.equal(before, after)
        for layer in model.base_model.malora_layers:
            layer.settings["default"].backend = "dense"
        torch.testing.assert_close(after, model(ids).logits, **CLOSE)


def test_changed_weights_are_seen(ids):
    model = adapted()
    assert_same(model, ids)
    model.load_state_dict({n: p * 0.9 if "malora_" in n else p for n, p in model.state_dict().items()})
    assert_same(model, ids)
    model.base_model.malora_layers[0].malora_B["default"].data = torch.ones_like(
        model.base_model.malora_layers[0].malora_B["default"]
    )
    assert_same(model, ids)


def test_two_passes_before_one_backward(ids):
    model = adapted()
    (model(ids).logits.sum() + model(ids.flip(1)).logits.sum()).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for layer in model.base_model.malora_layers:
        layer.settings["default"].backend = "dense"
    model.zero_grad()
    (model(ids).logits.sum() + model(ids.flip(1)).logits.sum()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad, **CLOSE, msg=name)


def test_one_layer_of_a_group_called_alone_or_again(ids):
    attention = adapted().base_model.model.model.layers[1].self_attn
    x = torch.randn(2, 3, attention.q_proj.in_features, dtype=DTYPE, device=DEVICE)
    y = attention.v_proj(x)
    torch.testing.assert_close(attention.v_proj(x), y, **CLOSE)
    x.mul_(2)  # the same tensor with other content
    twice = attention.v_proj(x)
    attention.v_proj.settings["default"].backend = "dense"
    torch.testing.assert_close(twice, attention.v_proj(x), **CLOSE)


def test_what_the_fused_path_cannot_compute_is_logged_and_computed_densely(ids, caplog):
    model = adapted("malora-decomposed-b")
    assert_same(model, ids)
    model = adapted()
    model.add_adapter("second", malora.METHODS["malora"](backend="fused", layers_to_transform=[1]))
    model.base_model.set_adapter(["default", "second"])
    model(ids)
    assert "several adapters at once" in caplog.text


def test_an_adapter_of_the_same_name_and_another_shape(ids):
    model = adapted()
    model(ids)
    few = {"backend": "fused", "lora_dropout": 0.0, "layers_to_transform": [1]}
    model.add_adapter("other", malora.METHODS["molora"](num_experts=FEW_EXPERTS, **few))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", malora.METHODS["malora"](r=4, d=6, num_experts=3, **few))
    model.set_adapter("default")
    assert_same(model.to(DEVICE, DTYPE), ids)


def test_a_copy_and_generation(ids):
    model = adapted().eval()
    again = copy.deepcopy(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with torch.no_grad():
        fused = model.generate(ids[:1, :4], max_new_tokens=5, do_sample=False)
        for layer in model.base_model.malora_layers:
            layer.settings["default"].backend = "dense"
        assert torch.equal(fused, model.generate(ids[:1, :4], max_new_tokens=5, do_sample=False))


def test_inference_after_training_sees_weights_that_a_fused_optimizer_changed(ids):
    """Check that inference after training sees changed weights.

    A fused optimizer does not increase versions, and inference mode computes layers one by one.
    """
    model = adapted()
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
    model(ids, use_cache=False).logits.sum().backward()
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.3)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with torch.inference_mode():
        after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, expected)
    assert (after - before).norm() > 0.01 * before.norm()


def test_inference_mode_computes_the_same_and_leaves_training_as_it_was(ids):
    """Its tensors have no version, so a change of them could not be seen."""
    model = adapted(lora_dropout=0.3)
    with torch.inference_mode():
        model(ids)
        model.eval()
        got = model(ids).logits
        assert torch.equal(got, model(ids).logits)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids).logits, **CLOSE)
    model.train()(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_recomputes_the_same(ids):
    model = adapted(lora_dropout=0.3, **BOTH_LAYERS)
    torch.manual_seed(3)
    model(ids, use_cache=False).logits.pow(2).mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    model(ids, use_cache=False).logits.pow(2).mean().backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("options", [
    {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 32}},  # the same scaling, another rank
    {"alpha_pattern": {"k_proj": 7, r"1\.mlp\.up_proj": 5}},  # the same rank, another scaling
    {"rank_pattern": {"[qkv]_proj": 5}, "use_rslora": True},  # another rank for a whole group
])  # fmt: skip
@pytest.mark.parametrize("method", ["malora", "asylora"])
def test_layers_of_different_ranks_or_scalings_are_not_computed_together(method, options, ids):
    model = adapted(method, **options)
    optimize_adapted_layers(model)
    assert_same(model, ids)


def test_layers_of_equal_rank_and_scaling_are_still_computed_together(ids):
    model = adapted(rank_pattern={"q_proj": 4})
    model(ids)
    attention, mlp = model.base_model.model.model.layers[1].self_attn, model.base_model.model.model.layers[1].mlp
    together = [
        [layer.name.rpartition(".")[2] for layer in a.layers] for a in attention.q_proj.group._adapters.values()
    ]
    assert together == [["q_proj"], ["k_proj", "v_proj"]]
    assert [len(a.layers) for a in mlp.up_proj.group._adapters.values()] == [2]
