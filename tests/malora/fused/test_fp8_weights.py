"""Float8 GEMMs: which matrices are quantized, and how often.

Tests of the fused backend cover the rest.
"""

import copy

import pytest
import torch
from peft import get_peft_model

import malora
from malora import METHODS, MaloraLayer
from malora.fused.availability import warn_once
from malora.fused.group import ProjectionGroup
from malora.fused.kernels import quantize_fp8
from malora.routing import RoutingLog
from tests.conftest import make_model

ON_GPU = torch.cuda.is_available()
# The interpreter computes in float64; the float8 matmuls of a GPU give bfloat16.
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float64)
CASES = {
    "malora": {},
    "malora with dropout": {"lora_dropout": 0.3},
    "asylora": {"method": "asylora", "lora_dropout": 0.0},  # no router
    "asylora with dropout": {"method": "asylora", "lora_dropout": 0.3},
    "molora of high rank": {
        "method": "molora",
        "lora_dropout": 0.3,
        "r": 16,
    },  # its rank is too high for the fused dropout
}


def group(method="malora", sizes=(48, 16, 16), n=64, bias=True, **options) -> list[MaloraLayer]:
    torch.manual_seed(0)
    shared, made = ProjectionGroup(), []
    for m in sizes:
        layer = MaloraLayer(torch.nn.Linear(n, m, bias).requires_grad_(False), "layer", RoutingLog(), shared)
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


def in_float8(t, least=0.0):
    """Return values in float8 and their scales, one per row."""
    t = t.flatten(0, -2).float()
    scale = t.abs().amax(1, keepdim=True).clamp(min=least) / 448
    return torch.where(scale > 0, t / scale, 0).to(torch.float8_e4m3fn).double(), scale.double()


def with_identities(layers):
    """Return copies in which W is zero and B the identity.

    Their output is α·h, and dh comes back.
    """
    layers = copy.deepcopy(layers)
    with torch.no_grad():
        for layer in layers:
            B = layer.factors("default").B
            B.copy_(torch.eye(B.shape[:2].numel(), B.shape[2]).view_as(B))
            for p in layer.base_layer.parameters():
                p.zero_()
    return layers


def expected_outputs(layers, x, dys):
    """Return [x h·u] [W (B/u)ᵀ]ᵀ + bias of float8 factors.

    B is in scales of W's rows, and u brings it to 448.
    """
    hs, weights = run(with_identities(layers), x, dys, "fused")[0], []
    least = max(layer.base_layer.weight.detach().abs().max().float() for layer in layers) / 256
    for layer in layers:
        W, B = layer.base_layer.weight.detach(), layer.factors("default").B.detach().flatten(0, 1)
        W, scale = in_float8(W, least)
        weights.append((W, scale.T, *in_float8(B / scale.T)))
    hs = [h[0].double()[:, : len(unit)] * unit.T for h, (*_, unit) in zip(hs, weights, strict=True)]
    row, of_row = in_float8(torch.cat([x[0].double(), *hs], 1))
    x, *hs = (row * of_row).split([x.shape[2], *(h.shape[1] for h in hs)], 1)
    each = zip(layers, hs, weights, strict=True)
    return [(x @ W.T + h @ B) * scale + layer.base_layer.bias.detach() for layer, h, (W, scale, B, _) in each]


def expected_gradients(layers, x, dys):
    """Return dx and the gradients of what trains.

    [dx dh] = dy [W Bᵀ] of float8 factors, and the rest follows from dh.
    """
    dy, of_dy = in_float8(torch.cat(dys, 2))
    W, of_W = in_float8(torch.cat([layer.base_layer.weight.detach() for layer in layers]).T)
    dhs = []
    for layer, part in zip(layers, dy.split([dy.shape[-1] for dy in dys], 1), strict=True):
        B, of_B = in_float8(layer.factors("default").B.detach().flatten(0, 1))
        dh = torch.zeros_like(part)  # as wide as y, to go back through an identity
        dh[:, : len(B)] = of_dy * (part @ B.T) * of_B.T
        dhs.append(dh.to(x.dtype)[None])
    _, dx, gradients = run(with_identities(layers), x, dhs, "fused")
    return of_dy * (dy @ W.T) * of_W.T + dx[0].double(), gradients


@pytest.mark.parametrize("case", CASES)
def test_only_gemms_with_frozen_weights_and_up_projections_are_quantized(case):
    layers = group(sizes=(160, 128, 128), **CASES[case])
    x, dys = data(layers)
    exact = run(layers, x, dys, "fused")[2]
    ys, dx, gradients = run(layers, x, dys, "fp8")
    expected_dx, expected = expected_gradients(layers, x, dys)
    pairs = [*zip(ys, expected_outputs(layers, x, dys), strict=True), (dx, expected_dx)]
    names = [name for layer in layers for name, p in layer.named_parameters() if p.requires_grad]
    for name, *of_each in zip(names, gradients, exact, expected, strict=True):
        is_B = name.startswith("malora_B")  # its gradient is of h and dy, which are not quantized
        pairs.append((of_each[0][None], of_each[1 if is_B else 2].double()))
        assert is_B or not torch.equal(of_each[0], of_each[1])
    bound = 1e-2 if ON_GPU else 1e-6  # a GPU rounds to bfloat16 in between
    for got, wanted in pairs:
        assert (got[0].double() - wanted).norm() < bound * wanted.norm()


def numbers_of_the_format(*shape, seed):
    """Return rows of numbers of the format that each have a 448.

    The interpreter halves what is rounded up to a power of two, so there are no other rows.
    """
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.abs() >= 1]  # so that a sixtieth of it has as many bits
    numbers = every[torch.randint(len(every), shape, generator=generator)]
    numbers[:, 0] = 448
    return numbers


def powers_of_two(*shape, seed, of=9):
    return 2.0 ** torch.randint(-of, of, shape, generator=torch.Generator().manual_seed(seed))


def noisy_on_a_gpu(x, seed):
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x * (1 + noise)).bfloat16().float() if ON_GPU else x


@pytest.mark.parametrize("H", [0, 8, 24])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("alpha, least", [(1.0, None), (0.5, 448.0)])
def test_the_kernel_quantizes_rows(parts, H, alpha, least):
    least = None if least is None else torch.tensor(least)
    scales = powers_of_two(9, 1, seed=parts, of=9 if least is None else 3)
    x = noisy_on_a_gpu(numbers_of_the_format(9, 96, seed=parts) * scales, parts)
    x[4] = 0
    up = gpu_up = None
    if H:  # two projections, columns up to a multiple of 16; some rows have their largest magnitude in h
        unit = powers_of_two(2, -(-H // 16) * 16, seed=3)
        h = numbers_of_the_format(2 * 9, H, seed=4).view(2, 9, H) * powers_of_two(2, 9, 1, seed=5, of=3)
        h = noisy_on_a_gpu(h * (x.abs().amax(1) / 448)[:, None], 6) / unit[:, None, :H]
        up, gpu_up = quantize_fp8.UpOperand(h, unit), quantize_fp8.UpOperand(h.to(DEVICE), unit.to(DEVICE))
    widths = {1: [96], 2: [80, 16], 3: [16, 48, 32]}[parts]
    expected = quantize_fp8.quantize_rows([x], up, None, alpha, least)
    parts = x.to(DEVICE).split(widths, 1)  # their rows lie apart
    got = quantize_fp8.Float8Rows(*(torch.empty_like(t, device=DEVICE) for t in expected))
    quantize_fp8.quantize_rows_triton(parts, gpu_up, got, alpha, None if least is None else least.to(DEVICE))
    assert torch.equal(got.scale.cpu(), expected.scale)
    assert torch.equal(got.values.cpu().float(), expected.values.float())
    assert (got.dequantize(torch.float32)[4] == 0).all()


@pytest.mark.parametrize("H, m", [(8, 48), (16, 528), (24, 640)])
def test_the_kernel_quantizes_B_next_to_a_weight(H, m):
    n, columns = 32, -(-H // 16) * 16
    scale = powers_of_two(m, 1, seed=1)
    B = noisy_on_a_gpu(numbers_of_the_format(H, m, seed=2), 2) * scale.T * powers_of_two(H, 1, seed=3)
    B[5] = 0
    found = {}
    for device, put in (("cpu", quantize_fp8.quantize_up_proj), (DEVICE, quantize_fp8.quantize_up_proj_triton)):
        values = torch.full((m, n + columns), 3.0).to(torch.float8_e4m3fn)
        W, unit = quantize_fp8.Float8Rows(values.to(device), scale.to(device)), torch.empty(columns, device=device)
        put(W, B.to(device), 0.5, unit)
        found[put] = W.values.cpu().float(), unit.cpu()
    (expected, of_expected), (got, of_got) = found.values()
    assert torch.equal(got, expected) and torch.equal(of_got, of_expected)
    assert (got[:, :n] == 3).all() and (got[:, n + H :] == 0).all() and (got[:, n + 5] == 0).all()
    assert got[:, n].abs().max() == 448
    near = got[:, n : n + H] * scale * of_got[:H] / 0.5
    assert (near.T - B).norm() < 0.05 * B.norm()


def test_weights_are_quantized_once_and_again_when_they_change():
    layers = group()
    shared, (x, dys) = layers[0].group, data(layers)

    def cached():
        run(layers, x, dys, "fp8")
        (found,) = shared.cache.float8.values()
        return found

    with torch.no_grad():
        before = layers[0](x)
    (forward_only,) = shared.cache.float8.values()
    assert forward_only.by_input is None  # nobody asked for a gradient
    first = cached()
    assert first.by_input is not None and first.by_output is forward_only.by_output
    for layer in layers:
        layer.eval().train()
    assert cached() is first
    with torch.no_grad():
        layers[0].base_layer.weight.mul_(2)
        assert not torch.equal(layers[0](x), before)
    second = cached()
    assert second is not first and torch.equal(second.by_output[0].scale, 2 * first.by_output[0].scale)
    layers[1].base_layer.weight.data = layers[1].base_layer.weight.data.clone()
    assert cached() is not second
    shared.clear_caches(include_frozen=True)
    assert not shared.cache.float8


@pytest.mark.parametrize("share", [1e-3, 1e-8, 0.0])
def test_small_weights_do_not_disturb_their_group_or_their_other_rows(share):
    """Check outputs next to weights that are small or zero.

    B in scales of W would otherwise be so large that x next to it is rounded to zero.
    """
    layers = group(sizes=(160, 128, 128))
    with torch.no_grad():
        layers[1].base_layer.weight.mul_(share)
        layers[2].base_layer.weight[7].mul_(share)
    x, dys = data(layers)
    for got, expected in zip(run(layers, x, dys, "fp8")[0], run(layers, x, dys, "fused")[0], strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()


def test_a_row_of_a_weight_that_is_not_finite_loses_itself_only():
    layers = group(sizes=(160,))
    with torch.no_grad():
        layers[0].base_layer.weight[7, 3] = torch.inf
    ((y,), *_) = run(layers, *data(layers), "fp8")
    assert (~y.isfinite()).any(1).sum() == 1 and not y[0, 0, 7].isfinite()


def test_copies_go_with_the_last_adapter_of_their_size_and_with_the_device():
    layers = group(r=4)
    shared, (x, _) = layers[0].group, data(layers)
    for layer in layers:
        layer.update_layer("larger", METHODS["malora"](backend="fp8", r=16))
        layer.to(DEVICE, DTYPE)

    def columns(adapter):
        for layer in layers:
            layer.set_adapter(adapter)
        layers[0](x)
        return sorted(key[-1] for key in shared.cache.float8)

    assert columns("default") == [32] and columns("larger") == [32, 128] and columns("default") == [32, 128]
    for layer in layers:
        layer.delete_adapter("larger")
    assert columns("default") == [32]
    layers[0].to("meta")
    assert not shared.cache.float8


def test_an_adapter_may_be_switched_between_the_passes():
    layers = group(r=4, sizes=(160, 128))
    for layer in layers:
        layer.update_layer("other", METHODS["malora"](backend="fp8", r=4))
        layer.to(DEVICE, DTYPE)
        layer.factors("other").B.data.normal_()
    x, dys = data(layers)
    found = []
    for others in ([], ["other"]):
        x = x.detach().clone().requires_grad_()
        ys = [layer(x) for layer in layers]
        for adapter in others:
            for layer in layers:
                layer.set_adapter(adapter)
            sum(layer(x.detach().requires_grad_()).sum() for layer in layers).backward()
        torch.autograd.backward(ys, dys)
        found.append(x.grad)
    assert torch.equal(*found)


def test_a_layer_that_does_not_fit_is_logged_and_computed_in_full(caplog):
    warn_once.cache_clear()
    layers = group(sizes=(48, 24))
    x, dys = data(layers)
    ys, dx, _ = run(layers, x, dys, "fp8")
    fused, fused_dx, _ = run(layers, x, dys, "fused")
    for got, expected in zip([*ys, dx], [*fused, fused_dx], strict=True):
        torch.testing.assert_close(got, expected)
    assert caplog.text.count("'fp8' cannot compute a layer with 24 features, no multiple of 16; the fused") == 1


def test_without_triton_it_is_logged_and_computed_densely(caplog, monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr("malora.fused.eligibility.interprets_triton", lambda: False)
    monkeypatch.setattr("malora.fused.eligibility.has_triton", lambda: False)
    layers = group()
    x, dys = data(layers)
    ys, *_ = run(layers, x, dys, "fp8")
    dense, *_ = run(layers, x, dys, "dense")
    for got, expected in zip(ys, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert "'fp8' cannot compute on" in caplog.text and "the dense backend does" in caplog.text


def test_a_model_is_near_the_fused_one(ids):
    """Compare a model of two layers of random weights with the fused one.

    The bound is four times float8's rounding, 2^-4 of a number.
    """
    results, options = {}, {"lora_dropout": 0.0, "top_k": 8}  # another choice of experts is no small change
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


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("sizes, n", [((4096,) * 3, 4096), ((11008,) * 2, 4096), ((4096,), 11008), ((576, 192), 576)])
def test_a_graph_replays_what_is_near_the_fused_one(sizes, n):
    layers = group(sizes=sizes, n=n, bias=False, lora_dropout=0.05)
    x, dys = data(layers, T=1000)
    fused, fused_dx, _ = run(layers, x, dys, "fused")
    ys, dx, _ = run(layers, x, dys, "fp8")
    for got, expected in zip([*ys, dx], [*fused, fused_dx], strict=True):
        # Three bits after the point: ±2^-4 / √3 · √½ = 2.6% of either factor, in root mean square over [1, 2).
        assert (got - expected).norm() < 0.05 * expected.norm()
    x.requires_grad_()
    for layer in layers:
        layer.settings["default"].lora_dropout = 0.0  # it would draw a new mask

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
