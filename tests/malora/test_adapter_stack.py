"""Stacked adapters: each has the outputs and gradients that it has alone on its rows."""

import pytest
import torch
from peft import get_peft_model

import malora
from malora import METHODS
from malora.adapter_stack import stack_adapters
from malora.fused import stacked_group
from malora.fused.availability import interprets_triton
from malora.load_balancing import has_router
from tests.conftest import make_model
from tests.malora.test_methods import randomise

METHODS_TO_STACK = (
    "asylora",
    "molora",
    "malora",
    "malora-fixed-s",
    "malora-unshared-s",
    "malora-decomposed-b",
    "molora-renormalized",
)
NAMES = ["a", "b", "c"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(not (interprets_triton() or ON_GPU), reason="needs Triton")


def with_adapters(configs, dtype=torch.float64):
    (name, config), *others = configs.items()
    model = get_peft_model(make_model(), config, adapter_name=name)
    for name, config in others:
        model.add_adapter(name, config)
    randomise(model.to(dtype)).to(DEVICE).train().base_model.set_adapter([*configs])
    return model


def run(model, rows, names, ids):
    """Run a pass, and return the losses by adapter."""
    by_row = [name for name in names for _ in range(rows[name])]
    logits = model(ids[: len(by_row)], adapter_names=by_row, use_cache=False).logits
    losses = {}
    for name, own in zip(names, logits.split([rows[name] for name in names]), strict=True):
        losses[name] = own.square().mean()
        if has_router(model) and model.peft_config[name].has_router:
            losses[name] = losses[name] + malora.balance_loss(model, adapter=name)
    return losses


def trained(model, name):
    return {n: p for n, p in model.named_parameters() if f".{name}" in n and p.requires_grad}


def gradients_of(stack, name):
    """Return the gradients of a stacked adapter, by layer and kind."""
    flat = stack.flat[stack.names.index(name)].grad
    found = [(b.kind, *pair) for b in stack._trained for pair in zip(b.layers, b.tensors(flat), strict=True)]
    return {(layer, kind): gradient for kind, layer, gradient in found}


# Adapters of a pass, and the rows of each.
PASSES = {
    "all": (["a", "b", "c"], {"a": 2, "b": 2, "c": 2}),
    "without the second": (["a", "c"], {"a": 2, "c": 2}),
    "the last two": (["b", "c"], {"b": 1, "c": 1}),
    "unequal rows": (["a", "b", "c"], {"a": 1, "b": 2, "c": 2}),
    "in reverse": (["c", "b", "a"], {"a": 1, "b": 1, "c": 1}),
}


CASES = [(method, "all") for method in METHODS_TO_STACK]
CASES += [(method, case) for method in ("malora", "asylora") for case in PASSES if case != "all"]


@pytest.mark.parametrize("method, case", CASES)
def test_a_stack_computes_what_its_adapters_do(method, case):
    compare_with_single_adapters(method, case, "dense")


KERNEL_CASES = [(method, "all") for method in ("malora", "molora", "asylora", "malora-unshared-s", "malora-fixed-s")]
KERNEL_CASES += [("malora", "without the second"), ("malora", "in reverse")]


@needs_triton
@pytest.mark.parametrize("method, case", KERNEL_CASES)
def test_a_stack_computes_the_same_together_with_the_frozen_layers(method, case, monkeypatch):
    calls = count_calls(monkeypatch)
    compare_with_single_adapters(method, case, "fused")
    # In each of two decoder layers for Q, K and V; for Gate and Up; and for Down. Each segment is computed by itself.
    segments = 1 if case == "all" else len(PASSES[case][0])
    assert len(calls) == (0 if method == "malora-unshared-s" else 2 * 3 * segments)


@needs_triton
def test_stacks_of_several_methods_share_a_pass(monkeypatch):
    options = {"lora_dropout": 0, "backend": "fused"}
    configs = {"a": METHODS["malora"](**options), "b": METHODS["malora"](**options), "c": METHODS["molora"](**options)}
    model, rows = with_adapters(configs), {"a": 2, "b": 2, "c": 1}
    ids = torch.randint(0, 61, (5, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = run(model, rows, NAMES, ids)
    calls = count_calls(monkeypatch)
    assert len(stack_adapters(model, NAMES)) == 2
    torch.testing.assert_close(run(model, rows, NAMES, ids), expected)
    assert len(calls) == 2 * 3 * 2


def count_calls(monkeypatch):
    calls = []
    compute = stacked_group.forward_stacked_group
    monkeypatch.setattr(stacked_group, "forward_stacked_group", lambda *a: calls.append(a) or compute(*a))
    return calls


def compare_with_single_adapters(method, case, backend):
    names, rows = PASSES[case]
    ids = torch.randint(0, 61, (6, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    configs = {name: METHODS[method](lora_dropout=0, backend=backend) for name in NAMES}
    model = with_adapters(configs)
    expected = run(model, rows, names, ids)
    sum(expected.values()).backward()
    wanted = {name: {n: p.grad.clone() for n, p in trained(model, name).items()} for name in names}

    (stack,) = stack_adapters(model, NAMES)
    assert stack.names == tuple(NAMES) and not any(trained(model, name) for name in NAMES)
    got = run(model, rows, names, ids)
    torch.testing.assert_close(got, expected)
    sum(got.values()).backward()
    for name in names:
        found = gradients_of(stack, name)
        assert len(found) == len(wanted[name]) > 0
        for (layer, kind), gradient in found.items():
            (theirs,) = (g for n, g in wanted[name].items() if f".{layer}.malora_{kind}.{name}" in n)
            torch.testing.assert_close(gradient, theirs, msg=f"{layer} {kind}")


def test_adapters_of_one_shape_are_stacked():
    configs = {
        "first": METHODS["malora"](),
        "lora": METHODS["asylora"](),
        "second": METHODS["malora"](router_aux_loss_coef=0.5, beta=2.0),
        "wide": METHODS["malora"](r=6, lora_alpha=12),
        "steady": METHODS["malora"](lora_dropout=0.0),
        "frozen": METHODS["malora-fixed-s"](r=12, lora_alpha=24),
    }
    stacks = stack_adapters(with_adapters(configs), configs)
    assert [stack.names for stack in stacks] == [("first", "second"), ("lora",), ("wide",), ("steady",), ("frozen",)]


def test_a_change_of_the_flat_parameter_changes_the_adapter():
    """In passes of the one adapter, too, as scoring makes them."""
    ids = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model = with_adapters({name: METHODS["molora"](lora_dropout=0) for name in NAMES})
    (stack,) = stack_adapters(model, NAMES)
    with torch.no_grad():
        stack.flat[1].mul_(0.5)
    model.set_adapter("b")
    alone = model(ids).logits
    torch.testing.assert_close(model(ids, adapter_names=["a", "b"]).logits[1], alone[1])
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, alone)


def test_dropout_differs_between_the_adapters_of_a_stack():
    model = with_adapters({name: METHODS["malora"](lora_dropout=0.5) for name in NAMES})
    (stack,) = stack_adapters(model, NAMES)
    with torch.no_grad():
        for flat in stack.flat:
            flat.copy_(stack.flat[0])
    ids = torch.randint(0, 61, (1, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE).expand(3, 5)
    logits = model(ids, adapter_names=NAMES).logits
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    logits = model.eval()(ids, adapter_names=NAMES).logits
    torch.testing.assert_close(logits[0], logits[2])


def test_the_number_of_operations_does_not_grow_with_the_adapters():
    def operations(names):
        model = with_adapters({name: METHODS["malora"](lora_dropout=0) for name in names})
        stack_adapters(model, names)
        ids = torch.zeros(len(names), 5, dtype=torch.long, device=DEVICE)
        with torch.profiler.profile() as profile:
            model(ids, adapter_names=names, use_cache=False)
        return sum(event.name == "aten::bmm" for event in profile.events())

    assert operations(NAMES) == operations(NAMES[:2]) > 0


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("method", ["malora", "asylora"])
def test_captured_passes_of_a_stack_are_the_eager_ones(method):
    """In bfloat16 under autocast, as `bench` trains; two shapes in turn, and gradients that add up."""

    def trained(max_graphs):
        model = with_adapters({name: METHODS[method](lora_dropout=0) for name in NAMES}, torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad is False and parameter.dim() > 1:
                parameter.data = parameter.data.bfloat16()
        (stack,) = stack_adapters(model, NAMES)

        def loss_of(_, batch):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                return sum(run(model, dict.fromkeys(NAMES, 2), NAMES, batch["ids"]).values())

        step = malora.capture_step(torch.nn.ModuleList([model, stack]), loss_of, max_graphs=max_graphs)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for length in (5, 9, 5, 9, 5, 9):
            losses.append(step.backward({"ids": torch.randint(0, 61, (6, length), generator=generator)}))
        assert step.replayed is (max_graphs > 0)
        return torch.stack(losses), [flat.grad.clone() for flat in stack.flat]

    (losses, gradients), (expected, theirs) = trained(4), trained(0)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    for gradient, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-3)
