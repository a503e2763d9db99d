"""The fused path inside torch.compile and torch.export: one graph, and the values of eager passes."""

import pytest
import torch
from peft import get_peft_model
from torch import library, nn

import malora
from malora.fused import augmented_weights, ops
from malora.fused.packed_weights import layout_sizes
from malora.fused.weight_cache import group_parameters
from tests.conftest import optimize_adapted_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 1e-3, "atol": 1e-4} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-6}
METHODS = ("asylora", "molora", "malora")
ATTENTION = ["q_proj", "k_proj", "v_proj"]  # one group; tracing takes time per group
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    """The linear layers of a decoder layer, without what lies between them. Q has a bias, as in Qwen2."""

    def __init__(self, width=32, inner=48):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, 16, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        x = x + self.q_proj(x) * (self.k_proj(x) * self.v_proj(x)).sum(-1, keepdim=True)
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


def adapted(method="malora", dropout=0.0, targets=ATTENTION):
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"r": 4, "lora_alpha": 8} | ({"d": 8} if method == "malora" else {})
    sizes |= {} if method == "asylora" else {"num_experts": 4}  # the interpreter's time grows with them
    config = malora.METHODS[method](
        backend="fused", lora_dropout=dropout, target_modules=targets, task_type=None, freeze=[], **sizes
    )
    model = get_peft_model(Block().requires_grad_(False), config).to(DEVICE).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    return model


def step(run, model, x, seed=1):
    """Return the output of a pass and all gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = run(x)
    y.square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) >= 3
    return {"y": y.detach(), "x": x.grad} | trained


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def x():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def compiled(model, **options):
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize(("method", "dropout"), [("asylora", 0.3), ("molora", 0.0), ("malora", 0.3)])
def test_a_compiled_model_is_one_graph_and_trains_as_an_eager_one(method, dropout, x):
    model = adapted(method, dropout, ALL if method == "malora" else ATTENTION)
    got = step(compiled(model), model, x)  # before any eager pass
    assert_close(got, step(model, model, x))


def test_a_model_can_be_compiled_after_an_eager_pass_and_in_evaluation(x):
    model = adapted()
    expected = step(model, model, x)
    assert_close(step(compiled(model), model, x), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), **CLOSE)


def test_one_graph_serves_other_lengths(x):
    model = adapted()
    inputs = {length: x[:, :length].clone() for length in (5, 3)}
    expected = {length: step(model, model, inputs[length]) for length in inputs}
    run = compiled(model, dynamic=True)
    for length, value in expected.items():
        with torch.compiler.set_stance("fail_on_recompile" if length != 5 else "default"):
            assert_close(step(run, model, inputs[length]), value)


def test_the_layers_of_a_group_share_one_operation(x):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = adapted(targets=ALL)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("malora.experts" in name for name in names) == 3  # Q, K, V; Gate, Up; Down


def test_decoder_layers_that_are_compiled_one_by_one_share_their_graphs(x):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = malora.METHODS["molora"](
        backend="fused",
        lora_dropout=0.0,
        r=4,
        lora_alpha=8,
        num_experts=4,
        target_modules=ATTENTION,
        task_type=None,
    )
    model = get_peft_model(nn.Sequential(*(Block() for _ in range(3))).requires_grad_(False), config).to(DEVICE).train()
    expected = step(model, model, x)
    for block in model.base_model.model:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(3):
        assert_close(step(model, model, x), expected)
    # Passes whose weights were packed for the whole model, and others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_passes_read_weights_that_a_weight_cache_packed(x, monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 0)
    model = adapted(dropout=0.3)
    optimize_adapted_layers(model)  # columns next to the weights, which the cache fills too
    assert any(group.cache.padding for group in model.base_model._groups if group.has_cache)
    run, cache = compiled(model), malora.WeightCache(model)
    step(model, model, x)
    cache.refresh()
    assert cache
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    expected = step(model, model, x)
    with cache:
        stale = step(run, model, x)
    assert not torch.allclose(stale["y"], expected["y"], **CLOSE)
    cache.refresh()
    with cache:
        assert_close(step(run, model, x), expected)


def test_a_compiled_model_follows_a_switch_of_adapters(x):
    model = adapted()
    model.add_adapter("other", malora.METHODS["molora"](
        backend="fused", lora_dropout=0.0, target_modules=["q_proj", "down_proj"], task_type=None, r=4, lora_alpha=8,
        num_experts=4,
    ))  # fmt: skip
    run = compiled(model)
    with torch.no_grad():
        first = run(x)
        model.set_adapter("other")
        torch.testing.assert_close(run(x), model(x), **CLOSE)
        with model.disable_adapter():
            torch.testing.assert_close(run(x), model.base_model.model(x), **CLOSE)
        model.set_adapter("default")
        torch.testing.assert_close(run(x), first, **CLOSE)


def test_a_compiled_pass_records_its_routing(x):
    model = adapted("molora")
    compiled(model)(x)
    got = malora.balance_loss(model)
    model(x)
    torch.testing.assert_close(got, malora.balance_loss(model), **CLOSE)


def test_a_model_can_be_exported(x):
    model = adapted().eval()
    exported = torch.export.export(model.get_base_model(), (x,), strict=True)
    torch.testing.assert_close(exported.module()(x), model(x), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_operations_keep_the_rules_of_torch(method, x):
    model = adapted(method)
    layers = [model.base_model.model.q_proj, model.base_model.model.k_proj, model.base_model.model.v_proj]
    sizes, parameters = layout_sizes(layers, "default"), group_parameters(layers, "default")
    rows = x.flatten(0, 1).detach()
    plain = [parameter.detach() for parameter in parameters]
    library.opcheck(ops.pack_weights, (plain, sizes, torch.float32))
    seed = torch.tensor([3], device=DEVICE)
    library.opcheck(ops.dropout_mask, (rows, seed, 0.3))
    flat, bits = ops.pack_weights(plain, sizes, torch.float32), ops.dropout_mask(rows, seed, 0.3)
    weights, biases = [layer.base_layer.weight for layer in layers], [layer.base_layer.bias for layer in layers]
    wanted = [parameter.detach().requires_grad_() for parameter in parameters]
    library.opcheck(
        ops.experts,
        (rows.requires_grad_(), bits, 0.3, flat, weights, biases, wanted, sizes, 2.0, False, False),
    )
