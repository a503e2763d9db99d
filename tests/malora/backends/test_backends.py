"""Agreement of every exact backend with the reference.

Outputs and all gradients agree, in float64, with dropout.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from malora import BACKENDS, METHODS, MaloraConfig, MaloraLayer
from malora.config import resolve_backend
from malora.fused import autograd, streams
from malora.fused.availability import interprets_triton
from malora.fused.kernels import down_tiling, dropout, gate
from malora.routing import RoutingLog

methods = [name for name in METHODS if isinstance(METHODS[name](), MaloraConfig)]


def layer(config: MaloraConfig, n: int = 72, m: int = 24) -> MaloraLayer:
    torch.manual_seed(0)
    made = MaloraLayer(torch.nn.Linear(n, m).requires_grad_(False), "layer", RoutingLog())
    made.update_layer("default", config)
    made.double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "malora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made.train()


class FusedMask(torch.nn.Module):
    """Dropout with the mask of the fused backend, computed by autograd."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.p:
            return x
        bits = dropout.draw_mask(x[..., 0].numel(), x.shape[-1], torch.randint(2**31 - 1, (1,)), self.p)
        kept = (bits[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, : x.shape[-1]]
        return x * kept.view_as(x) / (1 - round(dropout.LEVELS * self.p) / dropout.LEVELS)


def run(made: MaloraLayer, backend: str, x: torch.Tensor):
    made.settings["default"].backend = backend
    x = x.clone().requires_grad_()
    made.zero_grad()
    torch.manual_seed(7)  # the same dropout mask for every backend
    y = made(x)
    torch.manual_seed(8)
    (y * torch.randn_like(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in made.named_parameters() if p.requires_grad}


def assert_agrees(made: MaloraLayer, backend: str, x: torch.Tensor):
    got = run(made, backend, x)
    if backend == "fused" and made.adapter_for_fused_path():
        made.malora_dropout["default"] = FusedMask(made.settings["default"].lora_dropout)
    expected = run(made, "reference", x)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value is not None and value.abs().sum() > 0, name
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=f"{backend}: {name}")


EXACT = [name for name, backend in BACKENDS.items() if backend.exact]
others = pytest.mark.parametrize("backend", [name for name in EXACT if name != "reference"])


@others
@pytest.mark.parametrize("method", methods)
def test_agrees_with_the_reference(method, backend):
    assert_agrees(layer(METHODS[method](lora_dropout=0.3)), backend, torch.randn(3, 11, 72, dtype=torch.float64))


on_a_cpu = pytest.mark.skipif(not interprets_triton(), reason="Triton runs on a CPU as its interpreter only")


odd = [("malora", {"num_experts": 3}), ("molora", {"num_experts": 3}), ("malora", {"freeze": ["router"]})]


@on_a_cpu
@pytest.mark.parametrize("method, options", [*((method, {}) for method in methods), *odd])
def test_a_split_k_down_projection_agrees_with_the_reference(method, options, monkeypatch):
    """With a router the gate kernel adds up the partial sums."""
    monkeypatch.setattr(down_tiling, "MIN_BLOCKS_PER_SPLIT", 1)
    monkeypatch.setattr(down_tiling, "FORWARD", dataclasses.replace(down_tiling.FORWARD, block_n=32))
    gated, real_gate = [], gate.gate
    monkeypatch.setattr(gate, "gate", lambda *args: gated.append(args[-1]) or real_gate(*args))
    made = layer(METHODS[method](lora_dropout=0.3, **options))
    assert_agrees(made, "fused", torch.randn(3, 11, 72, dtype=torch.float64))
    config = made.settings["default"]
    assert [len(partial_sums) for partial_sums in gated] == [3] * (config.has_router and config.up == "B_t")


@on_a_cpu
@pytest.mark.parametrize("frozen", [None, "malora_B"])
@pytest.mark.parametrize("method", ["asylora", "molora", "malora"])
def test_large_inputs_agree_with_the_reference(method, frozen, monkeypatch):
    """They run the matmuls in another order, one after the other."""
    monkeypatch.setattr(streams, "MIN_SATURATING_ELEMENTS", 1)
    saturated = []

    def saturates_device(x):
        saturated.append(streams.saturates_device(x))
        return saturated[-1]

    monkeypatch.setattr(autograd, "saturates_device", saturates_device)
    made = layer(METHODS[method](lora_dropout=0.3))
    if frozen:
        getattr(made, frozen)["default"].requires_grad_(False)
    assert_agrees(made, "fused", torch.randn(3, 11, 72, dtype=torch.float64))
    assert saturated == [True]


@others
def test_an_empty_input_is_no_error(backend):
    made = layer(METHODS["malora"](lora_dropout=0.3))
    made.settings["default"].backend = backend
    x = torch.randn(0, 72, dtype=torch.float64, requires_grad=True)
    made(x).sum().backward()
    assert x.grad.shape == (0, 72) and not made.malora_B["default"].grad.any()


@others
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_agrees_on_odd_numbers_of_tokens(shape, backend):
    assert_agrees(layer(METHODS["molora"](top_k=8)), backend, torch.randn(*shape, 72, dtype=torch.float64))


@others
@pytest.mark.parametrize("method", ["molora", "malora"])
def test_uniform_gates_agree_with_the_reference(method, backend):
    made = layer(METHODS[method](gating="uniform", top_k=8, lora_dropout=0.3))
    assert made.router("default") is None
    assert_agrees(made, backend, torch.randn(3, 11, 72, dtype=torch.float64))


@others
@pytest.mark.parametrize(
    "options",
    [
        {"r": 1, "d": 3},
        {"r": 5, "d": 7},
        {"top_k": 1},
        {"top_k": 8},
        {"num_experts": 3},
        {"num_experts": 1, "top_k": 1},
    ],
)
def test_agrees_on_odd_ranks_and_numbers_of_experts(options, backend):
    assert_agrees(layer(METHODS["malora"](**options)), backend, torch.randn(2, 6, 72, dtype=torch.float64))


@others
def test_of_equally_probable_experts_the_first_are_used(backend):
    made = layer(METHODS["molora"](top_k=3))
    with torch.no_grad():
        made.malora_router["default"][1:] = made.malora_router["default"][1]
    x = torch.randn(2, 6, 72, dtype=torch.float64)
    assert_agrees(made, backend, x)
    assert (run(made, backend, x)["malora_B.default"][4:] == 0).all()


@others
def test_an_expert_without_tokens_gets_a_zero_gradient(backend):
    made = layer(METHODS["molora"]())
    with torch.no_grad():
        made.malora_router["default"][3] = 0
        made.malora_router["default"][:, 0] = torch.arange(8.0) - 100 * (torch.arange(8) == 3)
    x = torch.randn(2, 6, 72, dtype=torch.float64).abs() + 1
    gradients = run(made, backend, x)
    assert (gradients["malora_B.default"][3] == 0).all()
    assert torch.isfinite(gradients["x"]).all()


def resolved(monkeypatch, generation: int = 9, device: str = "cuda", **options) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=generation))
    return resolve_backend(METHODS["molora"](**options), torch.device(device))


def test_auto_is_fused_at_the_paper_s_sizes_and_sorted_beyond(monkeypatch):
    for r in (4, 8, 16, 32, 64):
        assert {resolved(monkeypatch, r=r, top_k=k) for k in (1, 2, 4, 8)} == {"fused"}
    many = {"num_experts": 1024, "r": 8}
    assert resolved(monkeypatch, **many) == "sorted"
    assert resolved(monkeypatch, **many, top_k=1024) == "fused"  # an expert that gets all tokens needs no sorting
    assert resolved(monkeypatch, **many, generation=8) == "fused"
    assert resolved(monkeypatch, **many, device="cpu") == "dense"
    assert resolved(monkeypatch, **many, backend="dispatch") == "dispatch"


@pytest.mark.parametrize("backend", ["sorted", "fused"])
def test_a_layer_uses_the_backend_that_auto_resolves_to(backend, monkeypatch):
    choices = {"auto": backend, "reference": "reference"}
    for module in ("malora.layer", "malora.fused.eligibility"):
        monkeypatch.setattr(f"{module}.resolve_backend", lambda config, device: choices[config.backend])
    made = layer(METHODS["molora"](num_experts=9, lora_dropout=0.0))
    assert made.adapter_for_fused_path() == ("default" if backend == "fused" and interprets_triton() else None)
    assert_agrees(made, "auto", torch.randn(2, 6, 72, dtype=torch.float64))


@pytest.mark.parametrize("backend", EXACT)
def test_16_bits_are_near_float64(backend):
    """Compare results of 16-bit operands with those of float64.

    Errors of bfloat16 operands are 1e-3 to 1e-2 of the norm. Triton's interpreter has float16 only.
    """
    dtype = torch.float16 if backend == "fused" else torch.bfloat16
    made = layer(METHODS["malora"](lora_dropout=0.0))
    x = torch.randn(4, 16, 72, dtype=torch.float64)
    exact = run(made, "reference", x)["y"]
    rough = run(made.to(dtype), backend, x.to(dtype))["y"].double()
    assert (rough - exact).norm() / exact.norm() < 2e-2


GATES = {
    "the paper's": ({"top_k": 2}, lambda p, chosen: p),
    "renormalised": ({"top_k": 2, "renormalize": True}, lambda p, chosen: p / p[chosen].sum()),
    "dense": ({"top_k": 3}, lambda p, chosen: p),
    "uniform": ({"top_k": 3, "gating": "uniform"}, lambda p, chosen: torch.full_like(p, 1 / 3)),
}


@pytest.mark.parametrize("options, gates", GATES.values(), ids=GATES)
def test_backends_compute_the_equations_of_the_paper(options, gates):
    """Equations 1 and 4 to 7 for one token, element by element; and other gates than the paper's."""
    config = METHODS["malora"](num_experts=3, r=2, d=4, lora_alpha=6, lora_dropout=0.0, **options)
    made = layer(config, n=5, m=3)
    x = torch.randn(5, dtype=torch.float64)
    W, b = made.base_layer.weight, made.base_layer.bias
    S, P, B = (made.get_parameter(f"malora_{name}.default") for name in ("S", "P", "B"))
    router = made.router("default") if config.has_router else torch.zeros(3, 5, dtype=torch.float64)
    p = torch.exp(router @ x) / torch.exp(router @ x).sum()
    y = W @ x + b
    chosen = p.argsort(descending=True)[: config.top_k]
    for t in chosen:
        y = y + 6 / 2 * gates(p, chosen)[t] * (B[t].T @ (P[t] @ (S @ x)))
    for backend in EXACT:
        made.settings["default"].backend = backend
        torch.testing.assert_close(made(x[None, None])[0, 0], y, rtol=1e-12, atol=1e-12)
