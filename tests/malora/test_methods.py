"""Properties that every method of METHODS has."""

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora
from malora import METHODS, TARGET_MODULES, MaloraConfig, make_config
from malora.method_options import LoraOptions, MaloraOptions
from malora.methods import Methods
from tests import processes
from tests.conftest import SHAPES, make_model

every_method = pytest.mark.parametrize("method", METHODS)
ours = [name for name in METHODS if isinstance(METHODS[name](), MaloraConfig)]
routed = [name for name in ours if METHODS[name]().has_router]

# Parameters that each method trains (the paper's sections 3 and 4, and Table 3).
TRAINED = {
    "lora": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "asylora": {"malora_B"},
    "molora": {"malora_router", "malora_A", "malora_B"},
    "moasylora": {"malora_router", "malora_B"},
    "malora": {"malora_router", "malora_S", "malora_P", "malora_B"},
    "malora-small": {"malora_router", "malora_S", "malora_P", "malora_B"},
    "molora-r12": {"malora_router", "malora_A", "malora_B"},
    "molora-same-a": {"malora_router", "malora_A", "malora_B"},
    "malora-fixed-s": {"malora_router", "malora_P", "malora_B"},
    "malora-symmetric": {"malora_router", "malora_S", "malora_P", "malora_B"},
    "malora-unshared-s": {"malora_router", "malora_S", "malora_P", "malora_B"},
    "malora-frozen-p": {"malora_router", "malora_S", "malora_B"},
    "malora-decomposed-b": {"malora_router", "malora_A", "malora_Q", "malora_S_B"},
    "molora-renormalized": {"malora_router", "malora_A", "malora_B"},
    "malora-renormalized": {"malora_router", "malora_S", "malora_P", "malora_B"},
}


def adapted(method: str, model=None, **options):
    torch.manual_seed(0)
    return get_peft_model(model or make_model(), METHODS[method](**options))


def randomise(model, seed: int = 3):
    """Change every adapter tensor at random.

    A test then does not see the zero initialization only.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def randomise_second(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def trained_names(model) -> set[str]:
    names = (name.split(".") for name, p in model.named_parameters() if p.requires_grad)
    return {next(word for word in name if "lora_" in word) for name in names}


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_unchanged_at_the_start(method, shape, ids):
    base = make_model(shape)
    before = base(ids).logits
    model = adapted(method, base, target_modules=TARGET_MODULES[shape]).eval()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=2e-6 if method == "dora" else 0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_right_parameters_train(method, dtype, ids):
    model = adapted(method, make_model().to(dtype))
    assert trained_names(model) == TRAINED[method]
    randomise(model)(ids).logits.pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name
    model.set_adapter("default")  # PEFT makes all of an adapter trainable here
    assert trained_names(model) == TRAINED[method]


def test_a_router_can_be_frozen():
    assert trained_names(adapted("malora", freeze=["router"])) == TRAINED["malora"] - {"malora_router"}


@every_method
def test_a_training_step_changes_only_the_trained_parameters(method, ids):
    model = randomise(adapted(method))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).logits.pow(2).mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


LOAD = """
import sys, torch, malora
from pathlib import Path
from peft import PeftModel
from tests.conftest import make_model
for folder in map(Path, sys.argv[1:]):
    model = PeftModel.from_pretrained(make_model(), folder, adapter_name="other").eval()
    torch.save(model(torch.load(folder / "ids.pt")).logits, folder / "logits.pt")
"""


def test_save_and_load_are_bitwise_in_a_new_process_and_under_another_name(ids, tmp_path):
    """Test all methods in one process, because starting it takes longer than loading."""
    expected = {}
    for method in METHODS:
        folder = tmp_path / method
        model = randomise(adapted(method)).eval()
        model.save_pretrained(folder)
        written = {path.name for path in folder.iterdir()} - {"README.md"}  # PEFT's model card
        assert written == {"adapter_config.json", "adapter_model.safetensors"}
        torch.save(ids, folder / "ids.pt")
        expected[method] = model(ids).logits
    (tmp_path / "load.py").write_text(LOAD)
    done = processes.run(tmp_path / "load.py", *(tmp_path / method for method in METHODS))
    assert done.returncode == 0, done.stderr
    for method, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / method / "logits.pt"), logits), method
        again = PeftModel.from_pretrained(make_model(), tmp_path / method, is_trainable=True)
        assert trained_names(again) == TRAINED[method]


@every_method
def test_two_adapters_live_on_one_base(method, ids):
    base = make_model()
    plain = base(ids).logits
    model = randomise(adapted(method, base)).eval()
    first = model(ids).logits
    model.add_adapter("second", METHODS[method]())
    randomise_second(model)
    assert torch.equal(model(ids).logits, first)  # adding an adapter does not change another
    model.set_adapter("second")
    assert not torch.equal(model(ids).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model.unload()(ids).logits, plain)


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method, ids):
    def gradients(checkpointing: bool):
        model = randomise(adapted(method, lora_dropout=0.1)).train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        loss = model(ids, use_cache=False).logits.pow(2).mean()
        if malora.has_router(model):
            loss = loss + malora.balance_loss(model)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@every_method
def test_a_bfloat16_base_takes_float32_adapters_and_generates(method, ids):
    model = randomise(adapted(method, make_model().to(torch.bfloat16)))
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert model(ids).logits.dtype == torch.bfloat16
    out = model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize("method", ours)
def test_merging_is_exact_without_a_router_and_refused_with_one(method, ids):
    model = randomise(adapted(method).to(torch.float64)).eval()
    before = model(ids).logits
    if method in routed:
        with pytest.raises(ValueError, match="routes tokens among 8 experts"):
            model.merge_and_unload()
        assert torch.equal(model(ids).logits, before)
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, before, rtol=1e-12, atol=1e-12)


def test_one_expert_of_ours_is_pefts_lora(ids):
    """The same weights in both layers give the same output and the same gradients."""
    theirs = randomise(get_peft_model(make_model().double(), LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGET_MODULES["llama"], task_type="CAUSAL_LM",
    )).double())  # fmt: skip
    ours = get_peft_model(make_model().double(), MaloraConfig(
        r=4, lora_alpha=6, num_experts=1, top_k=1, down="A_t", task_type="CAUSAL_LM",
    )).double()  # fmt: skip
    state = dict(theirs.named_parameters())
    matched = {}
    for name, parameter in ours.named_parameters():
        if "malora_A" in name:
            matched[name] = state[name.replace("malora_A.default", "lora_A.default.weight")]
            parameter.data = matched[name].data[None].clone()
        if "malora_B" in name:
            matched[name] = state[name.replace("malora_B.default", "lora_B.default.weight")]
            parameter.data = matched[name].data.T[None].clone()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-12, atol=1e-12)
    for model in (ours, theirs):
        model(ids).logits.pow(2).mean().backward()
    for name, parameter in ours.named_parameters():
        if name in matched:
            grad = matched[name].grad
            torch.testing.assert_close(parameter.grad[0], grad.T if "malora_B" in name else grad, rtol=1e-9, atol=1e-12)


# Trainable parameters of LLaMA-2 7B with the paper's ranks and modules.
LLAMA2_7B = {
    "lora": 143_130_624,
    "asylora": 157_286_400,
    "molora": 151_191_552,
    "molora-r12": 222_756_864,
    "moasylora": 165_347_328,
    "malora": 158_859_264,
    "malora-small": 109_142_016,
}


@pytest.mark.parametrize("method", LLAMA2_7B)
def test_trainable_parameters_at_llama2_7b_are_the_papers(method):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        ))  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    adapted = get_peft_model(model, METHODS[method](), low_cpu_mem_usage=True)
    assert adapted.get_nb_trainable_parameters()[0] == LLAMA2_7B[method]


def test_a_target_that_matches_nothing_is_an_error_that_names_the_modules():
    with pytest.raises(ValueError, match=r"\['c_attn'\] match nothing in this LlamaForCausalLM.*'q_proj'"):
        adapted("malora", target_modules=["q_proj", "c_attn"])


def test_a_target_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        adapted("malora", target_modules=["embed_tokens"])


@pytest.mark.parametrize("options, message", [
    ({"d": None}, "give its rank as d="),
    ({"down": "A_t"}, "d=32 has no effect"),
    ({"down": "A_t", "d": None, "beta": 2.0}, "beta=2.0 has no effect"),
    ({"same_start": True}, "same_start=True is for down='A_t'"),
    ({"freeze": ["A"]}, r"freeze=\['A'\] has no effect with these options; choose from \['P', 'S', 'router'\]"),
    ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
    ({"backend": "warp"}, "backend='warp' is unknown; choose one of 'auto', 'dense'"),
    ({"down": "A"}, "down='A' is unknown"),
    ({"down": "P_t S_t", "d": 12}, "12 / 8"),
    ({"r": 0}, "r=0 must be a whole number"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"beta": 0.0}, "beta=0.0 must be a positive number"),
    ({"lora_alpha": "16"}, "lora_alpha='16' must be a positive number"),
])  # fmt: skip
def test_an_option_that_is_wrong_or_without_effect_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        METHODS["malora"](**options)


@pytest.mark.parametrize("options, option, stored", [
    ({"down": "per_expert"}, "down", "A_t"),
    ({"down": "shared_subspace", "d": 32}, "down", "P_t S"),
    ({"down": "per_expert_subspace", "d": 32}, "down", "P_t S_t"),
    ({"down": "A_t", "up": "per_expert"}, "up", "B_t"),
    ({"down": "A_t", "up": "shared_subspace", "d": 32}, "up", "S_B Q_t"),
    ({"down": "A_t", "backend": "grouped"}, "backend", "sorted"),
])  # fmt: skip
def test_an_alias_stores_the_value_of_the_paper(options, option, stored):
    config = MaloraConfig(**options)
    assert config == MaloraConfig(**options | {option: stored})
    assert config.to_dict()[option] == stored


def test_the_error_of_an_unknown_value_lists_the_aliases():
    with pytest.raises(ValueError, match="'P_t S_t', 'per_expert', 'shared_subspace', 'per_expert_subspace'"):
        METHODS["malora"](down="shared")


@every_method
def test_an_unknown_option_is_an_error_that_names_the_nearest_one(method):
    message = r"(Malora|Lora)Config has no option 'rnk'; did you mean 'r'\? Choose from .*lora_alpha"
    with pytest.raises(TypeError, match=message):
        METHODS[method](rnk=3)
    with pytest.raises(TypeError, match=message):
        make_config(method, rnk=3)


@pytest.mark.parametrize("option", sorted(set(LoraOptions.__annotations__) - set(MaloraOptions.__annotations__)))
def test_an_option_of_pefts_lora_alone_is_an_error_with_a_reason(option):
    with pytest.raises(TypeError, match=f"MaloraConfig has no option {option!r}: .{{20,}}"):
        METHODS["malora"](**{option: None})
    METHODS["lora"](**{option: fields_of(LoraConfig)[option]})


def fields_of(config_class):
    config = config_class()
    return {field.name: getattr(config, field.name) for field in fields(config_class)}


def test_an_unknown_method_is_an_error_that_names_the_nearest_one():
    with pytest.raises(ValueError, match="there is no method 'mallora'; did you mean 'malora'"):
        make_config("mallora")


@every_method
def test_a_method_can_be_named_at_run_time(method):
    assert make_config(method, lora_dropout=0.3) == METHODS[method](lora_dropout=0.3)


def test_every_method_has_a_type():
    assert list(METHODS) == list(Methods.__annotations__)


@pytest.mark.parametrize("config_class, options", [(MaloraConfig, MaloraOptions), (LoraConfig, LoraOptions)])
def test_the_types_list_every_option(config_class, options):
    set_by_peft = {"peft_type", "auto_mapping", "peft_version"}
    assert {field.name for field in fields(config_class) if field.init} - set_by_peft == set(options.__annotations__)
