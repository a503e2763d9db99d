"""Weights that are copied once for several passes: the same results, and no stale ones."""

import pytest
import torch

import malora
from malora.fused import augmented_weights, packed_weights
from tests.malora.fused.test_augmented_weights import assert_close, rooms
from tests.malora.fused.test_group import DEVICE, adapted

CASES = [("malora", "fused"), ("asylora", "fused"), ("malora-small", "fused"), ("malora", "fp8"), ("asylora", "fp8")]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)


@pytest.fixture
def ids(ids):
    return ids.to(DEVICE)


def gradients(model, ids, seed=3):
    """Logits and gradients of two passes, one after the other."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = {}
    for n in range(2):
        logits = model(ids.roll(n, 1), use_cache=False).logits
        logits.pow(2).mean().backward()
        found[f"logits {n}"] = logits.detach()
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def change(model):
    """As a fused optimizer does: their versions stay."""
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.3)


def of_two_adapters(backend):
    """Of one size, "default" active."""
    model = adapted(backend=backend, lora_dropout=0.3)
    model.add_adapter("other", malora.METHODS["malora"](backend=backend, lora_dropout=0.3))
    for name, p in model.named_parameters():
        if ".other" in name:
            p.data = p.data.to(DEVICE, torch.get_default_dtype()).fill_(0.1).to(p)
    return model.train()


class Works:
    """How often weights are copied and B is put beside others."""

    def __init__(self, monkeypatch):
        self.counts = {}
        for where, name in (("malora.fused.packed_weights", "multi_tensor_copy"),
                            ("malora.fused.kernels.transpose_copy", "write_up_proj"),
                            ("malora.fused.fp8_weights", "quantize_up_proj")):  # fmt: skip
            self.watch(monkeypatch, where, name)

    def watch(self, monkeypatch, where, name):
        original = getattr(__import__(where, fromlist=["_"]), name)

        def counted(*args):
            self.counts[name] = self.counts.get(name, 0) + 1
            return original(*args)

        monkeypatch.setattr(f"{where}.{name}", counted)

    def since(self):
        counts, self.counts = self.counts, {}
        return counts


@pytest.mark.parametrize("method, backend", CASES)
def test_passes_that_find_weights_held_compute_the_same(method, backend, ids, monkeypatch):
    """Before the first pass nothing is held; after that each refresh is all the work there is."""
    held_model, model = (adapted(method, backend=backend, lora_dropout=0.3) for _ in range(2))
    held, works = malora.WeightCache(held_model), Works(monkeypatch)
    # In 8 bits each of six maps has room, else two families of a layer have: Down's outputs are too few.
    puts = {"quantize_up_proj": 2 * 6} if backend == "fp8" else {"write_up_proj": 2 * 2}
    for step in range(2):
        held.refresh()
        assert bool(held) is (step > 0)
        assert works.since() == ({"multi_tensor_copy": 1} | puts if step else {})
        with held:
            got = gradients(held_model, ids)
        assert bool(works.since()) is (step == 0)
        assert_close(got, gradients(model, ids))
        works.since()
        change(held_model), change(model)
    if backend == "fused":
        assert rooms(held_model)
    gradients(held_model, ids)
    assert works.since()["multi_tensor_copy"] == 2  # outside of `with` each pass makes its own


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_what_another_adapter_put_there_is_not_taken_for_ones_own(backend, ids):
    """Of the same size, so it has the same room."""
    models = [of_two_adapters(backend) for _ in range(2)]
    for model in models:
        gradients(model, ids)
    held = malora.WeightCache(models[0])
    held.refresh()
    found = []
    for model in models:
        with held:
            torch.manual_seed(3)
            loss = model(ids, use_cache=False).logits.pow(2).mean()
            model.set_adapter("other")
            model(ids, use_cache=False).logits.sum().backward()
            model.set_adapter("default")
            model.zero_grad()
            loss.backward()  # of a pass before the other's
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append([first, gradients(model, ids)])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


def test_a_backward_pass_of_before_a_refresh_fails(ids):
    model = adapted(lora_dropout=0.3)
    gradients(model, ids)
    held = malora.WeightCache(model)
    held.refresh()
    with held:
        loss = model(ids, use_cache=False).logits.sum()
    held.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_without_copies_has_nothing_to_refresh(ids):
    model = adapted(backend="dense")
    gradients(model, ids)
    held = malora.WeightCache(model)
    held.refresh()
    with held:
        assert not held
        gradients(model, ids)


def test_frozen_weights_that_change_are_seen(ids):
    """In 8 bits they are rounded again, and B with them."""
    models = [adapted(backend="fp8", lora_dropout=0.3) for _ in range(2)]
    for model in models:
        gradients(model, ids)
    held = malora.WeightCache(models[0])
    held.refresh()
    for model in models:
        with torch.no_grad():
            model.base_model.malora_layers[0].base_layer.weight.mul_(2)
    with held:
        assert_close(gradients(models[0], ids), gradients(models[1], ids))


def test_what_graphs_read_and_write_outlives_passes_of_other_kinds(ids):
    """Copies, B's units and the counts of sums stay where they are through evaluation and back."""
    model, fresh = (adapted(backend="fp8", lora_dropout=0.3) for _ in range(2))
    gradients(model, ids)
    held = malora.WeightCache(model)
    family = model.base_model.malora_layers[0].group

    def read():
        held.refresh()
        return [copies.flat for copies in held._copies], family.beside.units, family.counts

    flats, units, counts = read()
    with torch.no_grad():
        model(ids, use_cache=False)
    model.eval()
    with torch.inference_mode():
        model(ids, use_cache=False)
    model.train()
    change(model), change(fresh)
    flats_now, units_now, counts_now = read()
    assert counts is not None and counts_now is counts and not counts.any()
    assert units_now is units and all(a is b for a, b in zip(flats, flats_now, strict=True))
    with held:
        assert_close(gradients(model, ids), gradients(fresh, ids))


def test_counts_that_a_graph_would_make_are_not_kept(ids, monkeypatch):
    """They are zero only once it is replayed."""
    model = adapted(lora_dropout=0.3)
    monkeypatch.setattr(packed_weights, "is_captured", lambda like: True)
    gradients(model, ids)
    assert all(layer.group.counts is None for layer in model.base_model.malora_layers)


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_a_refresh_within_with_after_adapters_were_switched_leaves_nothing_held(backend, ids):
    models = [of_two_adapters(backend) for _ in range(2)]
    held = malora.WeightCache(models[0])
    gradients(models[0], ids)
    held.refresh()
    with held:
        gradients(models[0], ids)
        models[0].set_adapter("other")
        torch.manual_seed(5)
        models[0](ids, use_cache=False)
        held.refresh()
        models[0].set_adapter("default")
    change(models[0]), change(models[1])
    assert_close(gradients(models[0], ids), gradients(models[1], ids))


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_a_refresh_while_an_adapter_is_merged_changes_nothing(backend, ids):
    outputs = []
    for refreshes in (False, True):
        model = adapted("asylora", backend=backend, lora_dropout=0.3)
        gradients(model, ids)
        model.merge_adapter()
        if refreshes:
            malora.WeightCache(model).refresh()
        model.unmerge_adapter()
        outputs.append(gradients(model, ids))
    assert_close(*outputs)


def test_a_weight_that_was_away_during_a_refresh_does_not_find_an_old_up_side(ids):
    models = [adapted(lora_dropout=0.3) for _ in range(2)]
    for model in models:
        gradients(model, ids)
    held = malora.WeightCache(models[0])
    held.refresh()
    weight = models[0].base_model.malora_layers[0].base_layer.weight
    there, weight.data = weight.data, weight.data.clone()
    change(models[0]), change(models[1])
    held.refresh()
    weight.data = there
    with held:
        assert_close(gradients(models[0], ids), gradients(models[1], ids))


def test_passes_in_another_dtype_are_held_after_the_next_refresh(ids, monkeypatch):
    model = adapted(lora_dropout=0.3).bfloat16()
    gradients(model, ids)
    held, works = malora.WeightCache(model), Works(monkeypatch)
    held.refresh()
    model.float()
    with held:
        gradients(model, ids)
    held.refresh()
    works.since()
    with held:
        gradients(model, ids)
    assert not works.since()


def test_a_refresh_is_of_what_trains_alone(ids, monkeypatch):
    """Layers that inference computed one by one are not refreshed."""
    model = adapted(backend="fp8", lora_dropout=0.3)
    gradients(model, ids)
    with torch.inference_mode():
        model(ids, use_cache=False)
    held, works = malora.WeightCache(model), Works(monkeypatch)
    held.refresh()
    assert works.since() == {"multi_tensor_copy": 1, "quantize_up_proj": 2 * 6}
    with held:
        gradients(model, ids)
    assert not works.since()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method, backend", CASES)
def test_graphs_of_passes_read_what_a_graph_of_a_refresh_left(method, backend, ids):
    from malora.backbone.cuda_graphs import capture, capture_refresh, warm_up

    dtype = torch.bfloat16 if backend == "fp8" else torch.float32
    models = [adapted(method, backend=backend, lora_dropout=0.3).to(dtype) for _ in range(2)]
    seed = torch.full((1,), 5, device=DEVICE)
    trainable = [[p for p in model.parameters() if p.requires_grad] for model in models]

    def step(n):
        logits = models[n](ids, use_cache=False).logits
        return [logits, *torch.autograd.grad(logits.float().pow(2).mean(), trainable[n])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: seed)  # one mask for all
        warm_up(lambda: step(0))
        held, captured = malora.WeightCache(models[0]), []
        refresh = capture_refresh(held)
        with held:
            graph = capture(lambda: captured.append(step(0)), passes=0)
        assert held
        for _ in range(2):
            change(models[0]), change(models[1])
            refresh()
            for _ in range(2):
                graph.replay()
            for got, expected in zip(captured[0], step(1), strict=True):
                assert (got - expected).norm() < (2e-2 if backend == "fp8" else 1e-3) * expected.norm()
