"""Weights that are packed once for several passes.

The results are the same, and none are stale.
"""

import pytest
import torch

import malora
from malora.fused import augmented_weights, weight_cache
from tests.conftest import optimize_adapted_layers
from tests.malora.fused.test_augmented_weights import assert_close, padding
from tests.malora.fused.test_group import BOTH_LAYERS, DEVICE, DTYPE, FEW_EXPERTS, adapted

# One group of three and one of one: enough of both kinds, and the interpreter is slow.
FEW = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "layers_to_transform": [0], "lora_dropout": 0.3}
CASES = [("malora", "fused"), ("asylora", "fused"), ("malora-small", "fused"), ("malora", "fp8"), ("asylora", "fp8")]


@pytest.fixture(autouse=True)
def without_size_limit(monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)


@pytest.fixture
def ids(ids):
    return ids.to(DEVICE)


def made(method="malora", backend="fused"):
    """Return an adapted model with an optimized backbone."""
    model = adapted(method, backend=backend, **FEW)
    optimize_adapted_layers(model)
    return model


def gradients(model, ids, seed=3):
    """Return logits and gradients of two passes, one after the other."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = {}
    for n in range(2):
        logits = model(ids.roll(n, 1), use_cache=False).logits
        logits.pow(2).mean().backward()
        found[f"logits {n}"] = logits.detach()
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def change(model):
    """Change the trained weights as a fused optimizer does.

    Such an optimizer does not increase their versions.
    """
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.3)


def with_two_adapters(backend):
    """Return a model with two adapters of one size, "default" active."""
    model = adapted(backend=backend, **FEW)
    model.add_adapter("other", malora.METHODS["malora"](backend=backend, num_experts=FEW_EXPERTS, **FEW))
    for name, p in model.named_parameters():
        if ".other" in name:
            p.data = p.data.to(DEVICE, torch.get_default_dtype()).fill_(0.1).to(p)
    optimize_adapted_layers(model)
    return model.train()


class Tasks:
    """Counts of packed weights and of written up projections.

    They say how often weights are packed and up projections written next to frozen weights.
    """

    def __init__(self, monkeypatch):
        self.counts = {}
        for where, name in (("malora.fused.packed_weights", "multi_tensor_copy"),
                            ("malora.fused.bases", "write_up_proj"),
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
def test_passes_with_a_cache_compute_the_same(method, backend, ids, monkeypatch):
    """Compare passes with a cache to passes without one.

    Before the first pass the cache is empty; after that each refresh does all the packing.
    """
    cached_model, model = (made(method, backend) for _ in range(2))
    weights, tasks = malora.WeightCache(cached_model), Tasks(monkeypatch)
    # In float8 each of four layers has padded columns, else one group: Down has too few outputs.
    puts = {"quantize_up_proj": 4} if backend == "fp8" else {"write_up_proj": 1}
    for step in range(2):
        weights.refresh()
        assert bool(weights) is (step > 0)
        assert tasks.since() == ({"multi_tensor_copy": 1} | puts if step else {})
        with weights:
            got = gradients(cached_model, ids)
        assert bool(tasks.since()) is (step == 0)
        assert_close(got, gradients(model, ids))
        tasks.since()
        change(cached_model), change(model)
    if backend == "fused":
        assert padding(cached_model)
    gradients(cached_model, ids)
    assert tasks.since()["multi_tensor_copy"] == 2  # outside of `with` each pass packs its own


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_an_up_projection_of_another_adapter_is_not_used(backend, ids):
    """The other adapter has the same size, so it writes to the same padded columns."""
    models = [with_two_adapters(backend) for _ in range(2)]
    for model in models:
        gradients(model, ids)
    weights = malora.WeightCache(models[0])
    weights.refresh()
    found = []
    for model in models:
        with weights:
            torch.manual_seed(3)
            loss = model(ids, use_cache=False).logits.pow(2).mean()
            model.set_adapter("other")
            model(ids, use_cache=False).logits.sum().backward()
            model.set_adapter("default")
            model.zero_grad()
            loss.backward()  # of the pass before the other adapter's
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append([first, gradients(model, ids)])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


def test_a_backward_pass_across_a_refresh_fails(ids):
    model = made()
    gradients(model, ids)
    weights = malora.WeightCache(model)
    weights.refresh()
    with weights:
        loss = model(ids, use_cache=False).logits.sum()
    weights.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_without_packed_weights_has_nothing_to_refresh(ids):
    model = adapted(backend="dense")
    gradients(model, ids)
    weights = malora.WeightCache(model)
    weights.refresh()
    with weights:
        assert not weights
        gradients(model, ids)


def test_frozen_weights_that_change_are_seen(ids):
    """In float8 they are quantized again, and B with them."""
    models = [made(backend="fp8") for _ in range(2)]
    for model in models:
        gradients(model, ids)
    weights = malora.WeightCache(models[0])
    weights.refresh()
    for model in models:
        with torch.no_grad():
            model.base_model.malora_layers[0].base_layer.weight.mul_(2)
    with weights:
        assert_close(gradients(models[0], ids), gradients(models[1], ids))


def test_memory_of_graphs_outlives_evaluation(ids):
    """Packed weights, factors of h and split-K counters stay at their addresses."""
    model, fresh = (made(backend="fp8") for _ in range(2))
    gradients(model, ids)
    weights = malora.WeightCache(model)
    cache = model.base_model.malora_layers[0].group.cache

    def read():
        weights.refresh()
        return [buffer.flat for buffer, _ in weights._buffers], cache.loaded.up_scales, cache._counters

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
    with weights:
        assert_close(gradients(model, ids), gradients(fresh, ids))


def test_counters_made_while_a_graph_is_captured_are_not_kept(ids, monkeypatch):
    """They are zero only once the graph is replayed."""
    model = made()
    monkeypatch.setattr(weight_cache, "is_captured", lambda like: True)
    gradients(model, ids)
    assert all(layer.group.cache._counters is None for layer in model.base_model.malora_layers)


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_a_refresh_inside_with_after_adapters_were_switched_leaves_nothing_stale(backend, ids):
    models = [with_two_adapters(backend) for _ in range(2)]
    weights = malora.WeightCache(models[0])
    gradients(models[0], ids)
    weights.refresh()
    with weights:
        gradients(models[0], ids)
        models[0].set_adapter("other")
        torch.manual_seed(5)
        models[0](ids, use_cache=False)
        weights.refresh()
        models[0].set_adapter("default")
    change(models[0]), change(models[1])
    assert_close(gradients(models[0], ids), gradients(models[1], ids))


@pytest.mark.parametrize("backend", ["fused", "fp8"])
def test_a_refresh_while_an_adapter_is_merged_changes_nothing(backend, ids):
    outputs = []
    for refreshes in (False, True):
        model = made("asylora", backend)
        gradients(model, ids)
        model.merge_adapter()
        if refreshes:
            malora.WeightCache(model).refresh()
        model.unmerge_adapter()
        outputs.append(gradients(model, ids))
    assert_close(*outputs)


def test_a_weight_that_was_away_during_a_refresh_has_no_stale_up_projection(ids):
    models = [made() for _ in range(2)]
    for model in models:
        gradients(model, ids)
    weights = malora.WeightCache(models[0])
    weights.refresh()
    weight = models[0].base_model.malora_layers[0].base_layer.weight
    there, weight.data = weight.data, weight.data.clone()
    change(models[0]), change(models[1])
    weights.refresh()
    weight.data = there
    with weights:
        assert_close(gradients(models[0], ids), gradients(models[1], ids))


def test_padded_columns_that_are_allocated_anew_have_no_stale_up_projection(ids):
    """Optimize the backbone for an adapter of another size, then again for the first."""
    models = [made() for _ in range(2)]
    for model in models:
        model.add_adapter("other", malora.METHODS["molora"](backend="fused", r=3, num_experts=FEW_EXPERTS, **FEW))
        model.to(DEVICE, DTYPE)
        gradients(model, ids)
    weights = malora.WeightCache(models[0])
    weights.refresh()
    with weights:
        gradients(models[0], ids)
        before = padding(models[0])
        for name in ("other", "default"):
            models[0].set_adapter(name)
            optimize_adapted_layers(models[0])
        assert before and padding(models[0]) == before
        assert_close(gradients(models[0], ids), gradients(models[1], ids))


def test_passes_in_another_dtype_are_cached_after_the_next_refresh(ids, monkeypatch):
    model = adapted(**FEW).bfloat16()
    optimize_adapted_layers(model)
    gradients(model, ids)
    weights, tasks = malora.WeightCache(model), Tasks(monkeypatch)
    weights.refresh()
    model.float()
    with weights:
        gradients(model, ids)
    weights.refresh()
    tasks.since()
    with weights:
        gradients(model, ids)
    assert not tasks.since()


def test_a_refresh_packs_only_what_trains(ids, monkeypatch):
    """Layers that inference mode computed one by one are not refreshed."""
    model = made(backend="fp8")
    gradients(model, ids)
    with torch.inference_mode():
        model(ids, use_cache=False)
    weights, tasks = malora.WeightCache(model), Tasks(monkeypatch)
    weights.refresh()
    assert tasks.since() == {"multi_tensor_copy": 1, "quantize_up_proj": 4}
    with weights:
        gradients(model, ids)
    assert not tasks.since()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method, backend", CASES)
def test_graphs_of_passes_read_what_a_graph_of_a_refresh_wrote(method, backend, ids):
    from malora.backbone.cuda_graphs import capture, capture_refresh, warm_up

    dtype = torch.bfloat16 if backend == "fp8" else torch.float32
    models = [adapted(method, backend=backend, lora_dropout=0.3, **BOTH_LAYERS).to(dtype) for _ in range(2)]
    for model in models:
        optimize_adapted_layers(model)
    seed = torch.full((1,), 5, device=DEVICE)
    trainable = [[p for p in model.parameters() if p.requires_grad] for model in models]

    def step(n):
        logits = models[n](ids, use_cache=False).logits
        return [logits, *torch.autograd.grad(logits.float().pow(2).mean(), trainable[n])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: seed)  # one dropout mask for all
        warm_up(lambda: step(0))
        weights, captured = malora.WeightCache(models[0]), []
        refresh = capture_refresh(weights)
        with weights:
            graph = capture(lambda: captured.append(step(0)), passes=0)
        assert weights
        for _ in range(2):
            change(models[0]), change(models[1])
            refresh()
            for _ in range(2):
                graph.replay()
            for got, expected in zip(captured[0], step(1), strict=True):
                assert (got - expected).norm() < (2e-2 if backend == "fp8" else 1e-3) * expected.norm()
