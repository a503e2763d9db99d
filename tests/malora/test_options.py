"""Options that MaloraConfig shares with PEFT's LoRA: they mean the same, for every method and backend."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from malora import METHODS, MaloraConfig
from malora.backends.reference import reference
from malora.routing import route
from tests.conftest import make_model
from tests.malora.test_layer import small
from tests.malora.test_methods import ours, randomise

every_method = pytest.mark.parametrize("method", ours)
every_form = pytest.mark.parametrize("method", ["asylora", "malora", "malora-unshared-s", "malora-decomposed-b"])
every_backend = pytest.mark.parametrize("backend", ["dense", "dispatch", "sorted", "fused"])

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 3, r".*\.1\.mlp\.up_proj": 5},
    "alpha_pattern": {"k_proj": 9, "v_proj": 2},
}


def gpt2(**options) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=61, n_positions=32, **options)
    return GPT2LMHeadModel(config).eval()


def adapted(method: str, model: nn.Module, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(get_peft_model(model, METHODS[method](**options)).double()).eval()


def expected_output(layer, x: torch.Tensor, r: int, scaling: float) -> torch.Tensor:
    """Compute W x plus the experts' sum from the weights alone, one expert after the other."""
    weight = layer.base_layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.base_layer.weight
    factors, router = layer.factors("default"), layer.router("default")
    assert factors.down().shape[1:] == (r, x.shape[1]) and factors.up().shape[1:] == (r, weight.shape[0])
    routing = None if router is None else route(x, router, layer.settings["default"].top_k)
    return nn.functional.linear(x, weight, layer.base_layer.bias) + reference(x, routing, factors, scaling)


@every_backend
@every_form
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_are_those_of_the_patterns(method, backend, use_rslora):
    config = METHODS[method](backend=backend)
    model = adapted(method, make_model(), backend=backend, use_rslora=use_rslora, **PATTERNS)
    lora = get_peft_model(make_model(), LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, use_rslora=use_rslora, target_modules=["k_proj", "v_proj", "up_proj"],
        **PATTERNS,
    )).base_model.model  # fmt: skip
    for i, (part, name) in enumerate([
        ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("mlp", "up_proj"), ("self_attn", "q_proj")
    ]):  # fmt: skip
        for index in (0, 1):
            of = [getattr(getattr(m.model.layers[index], part), name) for m in (model.base_model.model, lora)]
            r, alpha = {0: (3, 9), 1: (config.r, 2)}.get(i, (config.r, config.lora_alpha))
            if (name, index) == ("up_proj", 1):
                r = 5
            scaling = alpha / (math.sqrt(r) if use_rslora else r)
            if name != "q_proj":
                assert (of[1].r["default"], of[1].scaling["default"]) == (r, pytest.approx(scaling))
            x = torch.randn(7, 64, dtype=torch.float64)
            torch.testing.assert_close(of[0](x), expected_output(of[0], x, r, scaling), rtol=1e-9, atol=1e-9)


def test_patterns_and_rslora_are_saved_and_loaded(ids, tmp_path):
    model = adapted("malora", make_model(), use_rslora=True, **PATTERNS).float()
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(again(ids).logits, logits)
    config = again.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern) == (PATTERNS["rank_pattern"], PATTERNS["alpha_pattern"])


def test_a_pattern_that_matches_no_target_is_a_warning_of_pefts():
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any targeted module.*\['o_proj'\]"):
        get_peft_model(make_model(), METHODS["malora"](rank_pattern={"o_proj": 3}))


@pytest.mark.parametrize("bias, trained", [
    ("none", set()),
    ("all", {"0.base_layer.bias", "1.bias"}),
    ("malora_only", {"0.base_layer.bias"}),
    ("lora_only", {"0.base_layer.bias"}),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["dense", "fused"])
@pytest.mark.parametrize("method", ["malora", "asylora"])
def test_biases_are_trained_saved_and_loaded(method, backend, bias, trained, tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))

    options = {"d": 8} if method == "malora" else {}
    config = METHODS[method](r=4, target_modules=["0"], task_type=None, bias=bias, backend=backend, **options)
    model = randomise(get_peft_model(base(), config))
    names = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "bias" in name} == trained
    assert any("malora_B" in name for name in names)
    assert not any("malora_A" in name for name in names)  # frozen
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 16)
    model(x).pow(2).sum().backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.base_model.model[1].bias, base()[1].bias) == (bias != "all")


@every_backend
@every_form
def test_without_init_weights_a_new_adapter_has_an_effect_and_its_other_factors_are_the_same(method, backend):
    def factors(init_weights):
        torch.manual_seed(0)
        options = {"d": 8} if METHODS[method]().d else {}
        config = METHODS[method](
            r=4, target_modules=["0"], task_type=None, backend=backend, init_weights=init_weights, **options
        )
        model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), config).eval()
        x = torch.randn(5, 16)
        return model.base_model.model[0].factors("default")._asdict(), model(x) - model.base_model.model[0].base_layer(
            x
        )

    (zero, nothing), (random, change) = factors(True), factors(False)
    assert not nothing.any() and change.abs().min() > 0
    last = "B" if zero["B"] is not None else "S_B"
    assert random[last].std() > 0.05 and random[last].abs().max() <= (1 / 4 if last == "S_B" else 1 / 2) * 1.5
    for name in zero.keys() - {last}:
        assert (zero[name] is None and random[name] is None) or torch.equal(zero[name], random[name])


@pytest.mark.parametrize("method", ["asylora", "malora"])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_some_tokens_are_trained_saved_loaded_and_merged(method, tied, ids, tmp_path):
    def base():
        torch.manual_seed(0)
        model = make_model()
        model.config.tie_word_embeddings = tied
        if tied:
            model.tie_weights()
        return model

    model = randomise(get_peft_model(base(), METHODS[method](trainable_token_indices=[3, 5], lora_dropout=0.0)))
    (delta,) = {p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert delta.shape == (2, 64) and delta.requires_grad
    model(torch.tensor([[3, 4, 5]])).logits.pow(2).mean().backward()
    assert delta.grad.abs().sum() > 0
    delta.data += 1.0
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(ids).logits, logits)
    if not METHODS[method]().has_router:
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, rtol=1e-4, atol=1e-4)


@every_backend
@every_form
def test_conv1d_of_gpt2_is_a_linear_layer_with_a_transposed_weight(method, backend):
    torch.manual_seed(0)
    conv, linear = Conv1D(8, 16), nn.Linear(16, 8)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    both = [small(method, module, backend=backend) for module in (conv, linear)]
    x = torch.randn(5, 16)
    torch.testing.assert_close(both[0](x), both[1](x))
    torch.testing.assert_close(both[0](x[0]), both[1](x[0]))
    if not METHODS[method]().has_router:
        y = both[0](x)
        both[0].merge_adapter()
        torch.testing.assert_close(both[0](x), y)
        both[0].unmerge_adapter()
        torch.testing.assert_close(both[0].merge_and_unload(safe_merge=True)(x), y)


@every_method
def test_gpt2_trains_generates_saves_and_loads(method, ids, tmp_path):
    model = adapted(method, gpt2()).float()
    adapted_names = {
        name.rpartition(".")[0] for name, p in model.named_parameters() if name.endswith("malora_B.default")
    }
    assert len(adapted_names) == (0 if METHODS[method]().up == "S_B Q_t" else 2 * 3)
    model.train()(ids).logits.pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    logits = model.eval()(ids).logits
    model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(gpt2(), tmp_path)(ids).logits, logits)


@pytest.mark.parametrize("options, message", [
    ({"bias": "some"}, "bias='some' is unknown; choose one of 'none', 'all', 'malora_only', 'lora_only'"),
    ({"init_weights": "gaussian"}, "init_weights='gaussian' must be True or False"),
    ({"use_rslora": 1}, "use_rslora=1 must be True or False"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be a whole number"),
    ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\]=2.5 must be a whole number"),
    ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\]=-1 must be a positive number"),
])  # fmt: skip
def test_a_wrong_value_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MaloraConfig(down="A_t", **options)
