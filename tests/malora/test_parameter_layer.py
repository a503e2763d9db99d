"""Adapters on bare parameters: the fused experts of transformers' mixtures, as PEFT's LoRA adapts them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as LoraParamWrapper
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from malora import MaloraConfig
from malora.analysis.experts import extract_experts, load_experts
from malora.parameter_layer import ParamWrapper
from tests.conftest import make_model
from tests.malora.test_methods import randomise

EXPERTS, HIDDEN, INNER = 3, 16, 24
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=EXPERTS)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **_QWEN, num_experts=EXPERTS)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**_SIZES, num_local_experts=EXPERTS, head_dim=8)),
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
every_model = pytest.mark.parametrize("model", MODELS)

# Forms without a router, by name.
FORMS: dict[str, dict[str, Any]] = {
    "A B": {"down": "A_t"},
    "frozen A": {"down": "A_t", "freeze": ["A"]},
    "shared S": {"down": "P_t S", "d": 6},
    "own S": {"down": "P_t S_t", "d": 6},
    "S_B Q": {"down": "A_t", "up": "S_B Q_t", "d": 6},
}
every_model_or_form = pytest.mark.parametrize(
    "model, form", [("mixtral", "A B"), ("qwen2_moe", "own S"), *(("gpt_oss", form) for form in FORMS)]
)


def base(model: str = "mixtral") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model]().eval()


def config(**options) -> MaloraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "num_experts": 1, "top_k": 1, "target_modules": ["q_proj"]}
    return MaloraConfig(**settings | {"down": "A_t", "target_parameters": PARAMETERS} | options)


def adapted(model: str = "mixtral", **options) -> PeftModel:
    torch.manual_seed(1)
    return randomise(get_peft_model(base(model), config(**options))).eval()


def wrappers(model: nn.Module) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def copy_from_lora(ours: PeftModel, lora: PeftModel) -> None:
    """Give our adapter the factors of PEFT's LoRA."""
    theirs = dict(lora.named_modules())
    for name, module in ours.named_modules():
        if hasattr(module, "malora_B"):
            A, B = (getattr(theirs[name], f"lora_{letter}")["default"].weight.data for letter in "AB")
            factors = module.factors("default")
            E, r, n = factors.A.shape
            factors.A.data = A.reshape(E, r, n)
            factors.B.data = B.reshape(-1, r, E).permute(2, 1, 0).clone()


@every_model
def test_the_output_is_that_of_pefts_lora(model, ids):
    options = {"r": 4, "target_modules": ["q_proj"], "target_parameters": PARAMETERS, "use_rslora": True,
               "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 5}}  # fmt: skip
    lora = get_peft_model(base(model), LoraConfig(**options, lora_alpha=8, init_lora_weights=False)).eval()
    ours = adapted(model, **options)
    copy_from_lora(ours, lora)
    assert sum(isinstance(m, LoraParamWrapper) for m in lora.modules()) == len(wrappers(ours)) == 4
    logits = base(model)(ids).logits
    assert (ours(ids).logits - logits).abs().max() > 0.1
    torch.testing.assert_close(ours(ids).logits, lora(ids).logits, rtol=1e-5, atol=1e-5)
    ours.train()(ids, labels=ids).loss.backward()
    lora.train()(ids, labels=ids).loss.backward()
    theirs = {name: parameter.grad for name, parameter in lora.named_parameters() if parameter.grad is not None}
    for wrapper in wrappers(ours):
        (name,) = (name for name, module in ours.named_modules() if module is wrapper)
        grad = theirs[f"{name}.lora_A.default.weight"].reshape(wrapper.factors("default").A.shape)
        torch.testing.assert_close(wrapper.factors("default").A.grad, grad, rtol=1e-4, atol=1e-6)


@every_model_or_form
def test_each_fused_expert_has_its_own_change(model, form):
    ours = adapted(model, **FORMS[form])
    for wrapper in wrappers(ours):
        factors, weight = wrapper.factors("default"), wrapper.parameter
        change = wrapper.adapted_weight() - weight
        torch.testing.assert_close(change, wrapper.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
        for e in range(EXPERTS):
            S = factors.S[e] if form == "own S" else factors.S
            down = factors.P[e] @ S if factors.A is None else factors.A[e]
            up = factors.Q[e] @ factors.S_B if factors.B is None else factors.B[e]
            expected = 2 * up.T @ down  # lora_alpha / r = 2
            expected = expected.T if model == "gpt_oss" else expected
            torch.testing.assert_close(change[e], expected, rtol=1e-4, atol=1e-5)
            assert torch.linalg.matrix_rank(change[e], rtol=1e-3) == 4
        shapes = {name: tuple(f.shape) for name, f in factors._asdict().items() if f is not None}
        assert shapes == _shapes(form, wrapper)


def _shapes(form: str, wrapper: ParamWrapper) -> dict[str, tuple[int, ...]]:
    n, m, d, r, E = wrapper.in_features, wrapper.out_features, 6, 4, EXPERTS
    A: dict[str, tuple[int, ...]] = {"A": (E, r, n)}
    B: dict[str, tuple[int, ...]] = {"B": (E, r, m)}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "A B": A | B,
        "frozen A": A | B,
        "shared S": {"P": (E, r, d), "S": (d, n)} | B,
        "own S": {"P": (E, r, d), "S": (E, d, n)} | B,
        "S_B Q": A | {"Q": (E, r, d), "S_B": (d, m)},
    }
    return shapes[form]


@pytest.mark.parametrize("model, form", [("mixtral", "shared S"), ("qwen2_moe", "frozen A"), ("gpt_oss", "shared S")])
def test_training_changes_the_output_and_the_adapter_alone(model, form, ids):
    torch.manual_seed(1)
    ours = get_peft_model(base(model), config(**FORMS[form])).train()
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    assert torch.equal(ours(ids).logits, base(model).train()(ids).logits)  # it starts without effect
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # in the first step the up projections are zero, and the down projections get no gradient
        optimizer.zero_grad()
        ours(ids, labels=ids).loss.backward()
        optimizer.step()
    assert (ours(ids).logits - base(model).train()(ids).logits).abs().max() > 1e-2
    trained = {"malora_B"} if form == "frozen A" else {"malora_B", "malora_P", "malora_S"}
    for name, parameter in ours.named_parameters():
        is_trained = name.split(".")[-2] in trained
        assert (parameter.grad is not None) == is_trained == (not torch.equal(parameter, before[name])), name


@every_model_or_form
def test_a_merged_adapter_computes_the_same_and_can_be_unmerged(model, form, ids):
    ours, weights = adapted(model, **FORMS[form]), dict(base(model).named_parameters())
    logits = ours(ids).logits
    with ours.disable_adapter():
        assert torch.equal(ours(ids).logits, base(model)(ids).logits)
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    for wrapper in wrappers(ours):
        torch.testing.assert_close(wrapper.parameter, weights[wrapper.name], rtol=1e-5, atol=1e-5)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(ids).logits, base(model)(ids).logits, rtol=1e-4, atol=1e-4)
    ours.merge_adapter()
    ours.base_model.disable_adapter_layers()  # unmerges in the next pass
    torch.testing.assert_close(ours(ids).logits, base(model)(ids).logits, rtol=1e-4, atol=1e-4)
    ours.base_model.enable_adapter_layers()
    merged = ours.merge_and_unload()
    assert [name for name, _ in merged.named_parameters()] == list(weights)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_unloaded_model_is_the_base(ids):
    unloaded = adapted(target_modules=[]).unload()
    assert torch.equal(unloaded(ids).logits, base()(ids).logits)
    assert not wrappers(unloaded)


def test_a_merge_that_would_not_be_finite_changes_nothing(ids):
    ours = adapted(target_modules=[], target_parameters=["1.mlp.experts.down_proj"])
    (wrapper,) = wrappers(ours)
    wrapper.factors("default").B.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"NaNs detected.*adapter default.*layers\.1\.mlp\.experts\.down_proj"):
        ours.merge_adapter(safe_merge=True)
    assert not wrapper.merged and torch.equal(wrapper.parameter, base().get_parameter(wrapper.name))


@pytest.mark.parametrize("model, low_cpu_mem_usage", [("mixtral", False), ("gpt_oss", True)])
def test_an_adapter_is_saved_and_loaded(model, low_cpu_mem_usage, ids, tmp_path):
    ours = adapted(model)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(model), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert sorted(again.peft_config["default"].target_parameters) == sorted(PARAMETERS)
    experts = extract_experts(ours)
    assert experts.keys() == load_experts(tmp_path).keys() and len(experts) == 6  # q_proj and two parameters, twice
    assert {len(factors.A) for name, factors in experts.items() if "experts" in name} == {EXPERTS}


def test_adapters_are_loaded_in_any_order_and_used_one_by_one_or_together(ids, tmp_path):
    ours = adapted()
    ours.add_adapter("other", config(r=2, lora_alpha=2))
    randomise(ours, seed=4)
    ours.save_pretrained(tmp_path)
    logits = {}
    for name in ("default", "other"):
        ours.set_adapter(name)
        logits[name] = ours(ids).logits
    again = PeftModel.from_pretrained(base(), tmp_path / "other", adapter_name="other")
    loaded = again.load_adapter(tmp_path, adapter_name="default")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert len(wrappers(again)) == 4
    for name in ("default", "other"):
        again.set_adapter(name)
        assert torch.equal(again(ids).logits, logits[name])
    again.base_model.set_adapter(["default", "other"])
    both = again(ids).logits
    (wrapper, *_) = wrappers(again)
    change = wrapper.get_delta_weight("default") + wrapper.get_delta_weight("other")
    torch.testing.assert_close(wrapper.adapted_weight(), wrapper.parameter + change, rtol=1e-5, atol=1e-5)
    again.delete_adapter("other")
    assert (again(ids).logits - both).abs().max() > 0.01
    again.set_adapter("default")
    assert torch.equal(again(ids).logits, logits["default"])


def test_adapters_on_other_parameters_are_refused_and_not_added(ids):
    ours = adapted()
    logits = ours(ids).logits
    with pytest.raises(ValueError, match=r"all adapters must target the same set of parameters.*'default'"):
        ours.add_adapter("other", config(target_parameters=PARAMETERS[:1]))
    assert list(ours.peft_config) == ["default"] and torch.equal(ours(ids).logits, logits)
    ours.add_adapter("linear", config(target_parameters=None))  # on modules alone
    ours.set_adapter("linear")
    assert torch.equal(ours(ids).logits, base()(ids).logits)


def test_the_weight_of_a_linear_layer_is_the_same_as_its_module(ids):
    torch.manual_seed(1)
    module = randomise(get_peft_model(make_model(), config(target_modules=["gate_proj"], target_parameters=None)))
    torch.manual_seed(1)
    parameter = randomise(
        get_peft_model(make_model(), config(target_modules=[], target_parameters=["gate_proj.weight"]))
    )
    assert (module(ids).logits - make_model()(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(parameter(ids).logits, module(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(wrappers(parameter)) == 2


def test_parameters_of_one_layer_can_be_named(ids):
    ours = adapted(target_modules=[], target_parameters=["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"])
    assert [wrapper.name for wrapper in wrappers(ours)] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert (ours(ids).logits - base()(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(use_reentrant, ids):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor | None]:
        ours = adapted().train()
        if checkpointing:
            ours.enable_input_require_grads()
            ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ours(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 12 and all(grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_base_keeps_its_dtype(autocast_adapter_dtype, ids):
    torch.manual_seed(1)
    model = base().bfloat16()
    ours = randomise(get_peft_model(model, config(), autocast_adapter_dtype=autocast_adapter_dtype))
    dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {factor.dtype for w in wrappers(ours) for factor in w.factors("default") if factor is not None} == {dtype}
    assert {w.adapted_weight().dtype for w in wrappers(ours)} == {torch.bfloat16}
    logits = ours(ids).logits
    assert logits.dtype == torch.bfloat16 and (logits - base()(ids).logits).abs().max() > 0.1
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids).logits, logits, rtol=0.1, atol=0.1)


def test_autocast_does_not_change_the_dtype_of_a_weight(ids):
    ours = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {w.adapted_weight().dtype for w in wrappers(ours)} == {torch.float32}
        logits = ours(ids).logits
    torch.testing.assert_close(logits.float(), ours(ids).logits, rtol=0.1, atol=0.1)


class Experts(nn.Module):
    """Two experts, with a weight that they cast themselves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 5).to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.weight.float(), x)


def test_a_float8_weight_is_changed_in_the_dtype_of_the_adapter():
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(torch.float8_e4m3fn)), torch.randn(3, 5)
    frozen = model[0].weight.float()
    ours = get_peft_model(model, config(target_modules=[], target_parameters=["0.weight"], init_weights=False))
    (wrapper,) = wrappers(ours)
    wrapper.factors("default").B.data[0, 0, 0] = 1e6  # out of range
    assert wrapper.factors("default").dtype == torch.float32
    expected = (frozen + wrapper.get_delta_weight("default")).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(wrapper.adapted_weight().float(), expected.float())
    assert expected.float().abs().max() == 448
    y = ours(x)
    torch.testing.assert_close(y, torch.einsum("eoi,bi->bo", expected.float(), x))
    ours.merge_adapter(safe_merge=True)
    assert torch.equal(ours(x), y)


def test_generation_uses_the_adapter(ids):
    ours = adapted()
    options = {"input_ids": ids[:1, :4], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = ours.generate(**options)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(**options), tokens)
    assert tokens.shape == (1, 10) and torch.equal(ours.merge_and_unload().generate(**options), tokens)


def test_a_compiled_model_computes_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(torch.float32)), torch.randn(3, 5)
    ours = get_peft_model(model, config(target_modules=[], target_parameters=["0.weight"], init_weights=False))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
