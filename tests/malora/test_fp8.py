"""The frozen products in 8 bits: what is rounded, and how often; all else is the fused backend's."""

import pytest
import torch
from peft import get_peft_model

import malora
from malora import METHODS, MaloraLayer
from malora.backends import fp8
from malora.routing import RoutingLog
from malora.siblings import Siblings, say_once
from tests.conftest import make_model

ON_GPU = torch.cuda.is_available()
# The interpreter computes in float64; a GPU in what its 8-bit products give.
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float64)
CASES = {
    "malora": {},
    "malora with dropout": {"lora_dropout": 0.3},
    "asylora": {"method": "asylora", "lora_dropout": 0.0},  # no router
    "asylora with dropout": {"method": "asylora", "lora_dropout": 0.3},
    "molora of high rank": {"method": "molora", "lora_dropout": 0.3, "r": 16},  # its dropout is a pass of its own
}


def siblings(method="malora", sizes=(48, 16, 16), n=64, bias=True, **options) -> list[MaloraLayer]:
    torch.manual_seed(0)
    family, made = Siblings(), []
    for m in sizes:
        layer = MaloraLayer(torch.nn.Linear(n, m, bias).requires_grad_(False), "layer", RoutingLog(), family)
        layer.update_layer("default", METHODS[method](**{"backend": "fp8", "lora_dropout": 0.0} | options))
        made.append(layer.to(DEVICE, DTYPE).train())
    with torch.no_grad():
        for layer in made:
            for name, p in layer.named_parameters():
                if "malora_" in name:
                    p.copy_(torch.randn(p.shape) * 0.1)
    return made


def run(layers, x, dys, backend):
    for layer in layers:
        layer.settings["default"].backend = backend
        layer.zero_grad()
    torch.manual_seed(7)  # the same dropout mask for both backends
    x = x.clone().requires_grad_()
    ys = [layer(x) for layer in layers]
    torch.autograd.backward(ys, dys)
    gradients = [p.grad for layer in layers for p in layer.parameters() if p.requires_grad]
    return [y.detach() for y in ys], x.grad, gradients


def data(layers, T=37):
    x = torch.randn(1, T, layers[0].in_features, dtype=DTYPE, device=DEVICE)
    x[0, 3] = 0
    dys = [torch.randn(1, T, layer.out_features, dtype=DTYPE, device=DEVICE) for layer in layers]
    for dy in dys:
        dy[0, 5] = 0
    return x, dys


def deq(t):
    """To 8 bits and back, a scale a row."""
    t = t.flatten(0, -2).float()
    scale = t.abs().amax(1, keepdim=True) / 448
    values = torch.where(scale > 0, t / scale, 0).to(torch.float8_e4m3fn)
    return values.double() * scale.double()


def change(layers, x, dys):
    """What rounding changes in the outputs and in the input's gradient."""
    weights = [layer.base_layer.weight.double() for layer in layers]
    outputs = [deq(x) @ deq(W).T - x[0].double() @ W.T for W in weights]
    dy, W = torch.cat(dys, 2), torch.cat(weights)
    return outputs, deq(dy) @ deq(W.T).T - dy[0].double() @ W


@pytest.mark.parametrize("case", CASES)
def test_only_the_frozen_products_are_rounded(case):
    layers = siblings(**CASES[case])
    x, dys = data(layers)
    fused, fused_dx, fused_gradients = run(layers, x, dys, "fused")
    ys, dx, gradients = run(layers, x, dys, "fp8")
    outputs, input_gradient = change(layers, x, dys)
    pairs = [*zip(ys, fused, outputs, strict=True), (dx, fused_dx, input_gradient)]
    bound = 1e-2 if ON_GPU else 1e-10  # a GPU rounds to bfloat16 before and after it adds the adapter's part
    for got, exact, by in pairs:
        expected = exact[0].double() + by
        assert (got[0].double() - expected).norm() < bound * expected.norm()
    for got, expected in zip(gradients, fused_gradients, strict=True):
        torch.testing.assert_close(got, expected)  # they are of x and dy as they came


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_kernel_rounds_rows(parts):
    """The interpreter halves what is rounded up to a power of two, so there numbers are those of the format."""
    generator = torch.Generator().manual_seed(parts)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    x = every[torch.randint(len(every), (9, 96), generator=generator)]
    x[:, 0] = 448
    x = x * 2.0 ** torch.randint(-9, 9, (9, 1), generator=generator)
    if ON_GPU:
        x = (x + 0.1 * torch.randn(x.shape, generator=generator)).bfloat16().float()
    x[4] = 0
    widths = {1: [96], 2: [80, 16], 3: [16, 48, 32]}[parts]
    expected = fp8.rounded([x])
    got = fp8.rounded_by_kernel([part.contiguous() for part in x.to(DEVICE).split(widths, 1)])
    assert torch.equal(got.scale.cpu(), expected.scale)
    assert torch.equal(got.values.cpu().float(), expected.values.float())
    assert (got.wide(torch.float32)[4] == 0).all()


def test_weights_are_rounded_once_and_again_when_they_changed():
    layers = siblings()
    family, (x, dys) = layers[0].siblings, data(layers)

    def kept():
        run(layers, x, dys, "fp8")
        (found,) = family.frozen.values()
        return found

    with torch.no_grad():
        before = layers[0](x)
    (forward_only,) = family.frozen.values()
    assert forward_only.by_input is None  # nobody asked for a gradient
    first = kept()
    assert first.by_input is not None and first.by_output is forward_only.by_output
    for layer in layers:
        layer.eval().train()
    assert kept() is first
    with torch.no_grad():
        layers[0].base_layer.weight.mul_(2)
        assert not torch.equal(layers[0](x), before)
    second = kept()
    assert second is not first and torch.equal(second.by_output[0].scale, 2 * first.by_output[0].scale)
    layers[1].base_layer.weight.data = layers[1].base_layer.weight.data.clone()
    assert kept() is not second
    family.release(frozen=True)
    assert not family.frozen


def test_a_layer_that_does_not_fit_is_said_and_computed_in_full(caplog):
    say_once.cache_clear()
    layers = siblings(sizes=(48, 24))
    x, dys = data(layers)
    ys, dx, _ = run(layers, x, dys, "fp8")
    fused, fused_dx, _ = run(layers, x, dys, "fused")
    for got, expected in zip([*ys, dx], [*fused, fused_dx], strict=True):
        torch.testing.assert_close(got, expected)
    assert caplog.text.count("'fp8' cannot compute a layer with a side of 24, no multiple of 16; the fused") == 1


def test_where_no_kernel_runs_it_is_said_and_computed_densely(caplog, monkeypatch):
    say_once.cache_clear()
    monkeypatch.setattr("malora.layer.interprets_triton", lambda: False)
    monkeypatch.setattr("malora.layer.has_triton", lambda: False)
    layers = siblings()
    x, dys = data(layers)
    ys, *_ = run(layers, x, dys, "fp8")
    dense, *_ = run(layers, x, dys, "dense")
    for got, expected in zip(ys, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert "'fp8' cannot compute on" in caplog.text and "the dense backend does" in caplog.text


def test_a_model_is_near_the_fused_one(ids):
    """Through two layers of a model of random weights; the bound is four times float8's rounding, 2^-4 of a number."""
    results, options = {}, {"lora_dropout": 0.0, "top_k": 8}  # a choice of experts is no small change
    for backend in ("fused", "fp8"):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), METHODS["malora"](**options, backend=backend)).to(DEVICE).train()
        for name, p in model.named_parameters():
            if "malora_" in name:
                p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
        logits = model(ids.to(DEVICE), use_cache=False).logits
        (logits.pow(2).mean() + malora.balance_loss(model)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results[backend] = {"logits": logits.detach()} | gradients
    assert results["fused"].keys() == results["fp8"].keys()
    for name, expected in results["fused"].items():
        assert (results["fp8"][name] - expected).norm() < 0.25 * expected.norm(), name
    assert not torch.equal(results["fp8"]["logits"], results["fused"]["logits"])


@pytest.mark.skipif(not ON_GPU, reason="a GPU multiplies in 8 bits and captures graphs")
@pytest.mark.parametrize("sizes, n", [((4096,) * 3, 4096), ((11008,) * 2, 4096), ((4096,), 11008), ((576, 192), 576)])
def test_a_graph_replays_what_is_near_the_fused_one(sizes, n):
    layers = siblings(sizes=sizes, n=n, bias=False, lora_dropout=0.05)
    x, dys = data(layers, T=1000)
    fused, fused_dx, _ = run(layers, x, dys, "fused")
    ys, dx, _ = run(layers, x, dys, "fp8")
    for got, expected in zip([*ys, dx], [*fused, fused_dx], strict=True):
        # Three bits after the point: ±2^-4 / √3 · √½ = 2.6% of either factor, in root mean square over [1, 2).
        assert (got - expected).norm() < 0.05 * expected.norm()
    x.requires_grad_()
    for layer in layers:
        layer.settings["default"].lora_dropout = 0.0  # which would draw anew

    def step():
        found = [layer(x) for layer in layers]
        return [*found, *torch.autograd.grad(found, x, dys)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for result in captured:
        result.detach().zero_()
    graph.replay()
    for got, value in zip(captured, expected, strict=True):
        assert (got - value).norm() < 5e-3 * value.norm()  # a library may take another kernel, which rounds elsewhere
