"""Default targets: all methods adapt the same modules of a model, or refuse it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from malora import METHODS, TARGET_MODULES
from tests.conftest import make_model

NOT_IN_TRANSFORMERS = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
ONE_OF_EACH_FAMILY = ["llama", "mixtral", "phi3", "gpt_neox", "opt", "gpt2", "gpt_neo", "gptj", "codegen", "mpt"]
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def shallow(model_type: str, **options) -> nn.Module:
    """Make a model of a type at its default size with two layers, without memory for its weights."""
    config = AutoConfig.for_model(model_type, **options)
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        for name in LAYER_COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 2)
    with torch.device("meta"):
        if model_type == "llama4":
            return AutoModelForImageTextToText.from_config(config)
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:
            return AutoModel.from_config(config)


def adapted(method: str, model: nn.Module) -> set[str]:
    peft_model = get_peft_model(model, METHODS[method](task_type=None), low_cpu_mem_usage=True)
    return {name for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(set(TARGET_MODULES) - NOT_IN_TRANSFORMERS - {"gemma4", "gemma4_text"}))
def test_all_methods_adapt_the_same_modules_or_refuse_the_model(model_type):
    ours = adapted("malora", shallow(model_type))
    assert ours
    try:
        theirs = adapted("lora", shallow(model_type))
    except ValueError as error:  # it knows no name of this model
        assert "not found in the base model" in str(error)
        assert TARGET_MODULES[model_type] == PEFT_TARGETS[model_type]
    else:
        assert theirs == ours


def test_all_methods_adapt_the_language_model_of_gemma4():
    config = AutoConfig.for_model("gemma4")
    config.text_config.num_hidden_layers, config.text_config.layer_types = 1, ["full_attention"]
    with torch.device("meta"):
        both = [adapted(method, AutoModelForImageTextToText.from_config(config)) for method in ("lora", "malora")]
    assert both[0] == both[1] and len(both[0]) == 6


@pytest.mark.parametrize("model_type", ONE_OF_EACH_FAMILY)
def test_the_output_of_attention_is_not_adapted_and_its_inputs_are(model_type):
    names = TARGET_MODULES[model_type]
    assert not {"o_proj", "out_proj", "dense", "c_proj"} & set(names)
    assert any("q" in name.lower() or "attn" in name for name in names)


def test_every_type_that_pefts_lora_knows_has_default_targets():
    assert set(PEFT_TARGETS) <= set(TARGET_MODULES)


def test_names_that_a_variant_lacks_are_left_out_of_the_default():
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, T5Config

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(  # its language model is a T5, which has none of OPT's attention names
        vision_config=Blip2VisionConfig(**small).to_dict(),
        qformer_config=Blip2QFormerConfig(**small, vocab_size=20, encoder_hidden_size=32).to_dict(),
        text_config=T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=20).to_dict(),
    )
    model = get_peft_model(Blip2ForConditionalGeneration(config), METHODS["molora"](r=2, task_type=None))
    assert model.peft_config["default"].target_modules == {"fc1", "fc2"}


def test_a_type_without_default_targets_is_an_error_that_names_the_modules():
    class UnheardOfConfig(LlamaConfig):
        model_type = "unheard-of"

    model = LlamaForCausalLM(UnheardOfConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"'unheard-of'.*'down_proj', 'gate_proj'"):
        get_peft_model(model, METHODS["malora"]())
    with pytest.raises(ValueError, match=r"no default targets are known.*\['0', '2'\]"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), METHODS["malora"](task_type=None))


def test_a_name_that_the_user_gave_must_match_even_if_others_do():
    with pytest.raises(ValueError, match=r"\['fc1'\] match nothing"):
        get_peft_model(make_model(), METHODS["malora"](target_modules=["q_proj", "fc1"]))


def test_fused_expert_weights_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"\['gate_up_proj'\] are parameters of this MixtralForCausalLM and no modules"
    ):
        get_peft_model(shallow("mixtral"), METHODS["malora"](target_modules=["q_proj", "gate_up_proj"]))


def test_lora_of_peft_keeps_targets_that_the_user_gave():
    assert METHODS["lora"](target_modules=["q_proj"]) == LoraConfig(
        r=64, lora_alpha=128, lora_dropout=0.05, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
