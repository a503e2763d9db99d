"""The tuner in PEFT: what it takes and what it refuses."""

import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast, pipeline

from malora import METHODS
from tests.conftest import make_model
from tests.malora.test_methods import randomise


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model and an adapter for it in folders, the ids of a batch, and their logits."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model = make_model()
    model.save_pretrained(base)
    model.name_or_path = str(base)
    ids = torch.arange(10)[None]
    adapted = randomise(get_peft_model(model, METHODS["malora"]())).eval()
    adapted.save_pretrained(adapter)
    return base, adapter, ids, adapted(ids).logits


@pytest.mark.parametrize("load", [
    lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    lambda base, adapter: _load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter),
    lambda base, adapter: pipeline("text-generation", model=str(adapter), tokenizer=_tokenizer()).model,
], ids=["AutoModel", "AutoPeftModel", "load_adapter", "pipeline"])  # fmt: skip
def test_an_adapter_opens_by_every_door_of_transformers(saved, load):
    base, adapter, ids, logits = saved
    torch.testing.assert_close(load(base, adapter).eval()(ids).logits, logits)


def _load_adapter(model, adapter):
    model.load_adapter(adapter)
    return model


def _tokenizer():
    vocabulary = {"<unk>": 0, "a": 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>")), unk_token="<unk>")


def test_the_type_of_an_adapter_is_what_peft_expects(saved):
    model = get_peft_model(make_model(), METHODS["malora"]())
    assert model.get_model_status().peft_types == {"default": "MALORA"}
    assert {status.module_type for status in model.get_layer_status()} == {"malora.MaloraLinear"}
    peft_type = model.peft_config["default"].peft_type
    assert peft_type.value == peft_type == "MALORA" and hash(peft_type) == hash("MALORA")
    assert pickle.loads(pickle.dumps(peft_type)) is peft_type
    assert json.loads(json.dumps(peft_type)) == "MALORA"
    assert PeftConfig.from_pretrained(saved[1]).peft_type is peft_type


def test_what_pefts_lora_alone_can_do_ends_in_pefts_own_errors(saved):
    model = get_peft_model(make_model(), METHODS["malora"]())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MALORA was passed"):
        hotswap_adapter(model, saved[1], "default")
    with pytest.raises(ValueError, match="'MALORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(make_model(), METHODS["malora"](), mixed=True)
    with pytest.raises(ValueError, match="MALORA"):
        PeftMixedModel.from_pretrained(make_model(), saved[1])


def test_modules_that_are_never_called_are_refused():
    attention = nn.Sequential(nn.MultiheadAttention(64, 2), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"0\.out_proj cannot be adapted: nn.MultiheadAttention reads its weight"):
        get_peft_model(attention, METHODS["malora"](target_modules="all-linear", task_type=None))
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=20))
    for config in (METHODS["malora"](target_modules=["out_proj"], d=16), LoraConfig(target_modules=["out_proj"])):
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            get_peft_model(mamba, config)
    get_peft_model(mamba, METHODS["malora"](target_modules=["in_proj"], d=16))


@pytest.mark.parametrize("method", ["malora", "asylora", "malora-decomposed-b"])
def test_further_adapters_go_on_all_linear_modules(method, ids):
    model = get_peft_model(make_model(), METHODS[method](target_modules=["q_proj"]))
    model.add_adapter("second", METHODS[method](target_modules="all-linear"))
    model.add_adapter("third", METHODS[method](target_modules="all-linear"))
    for adapter in ("second", "third"):
        layers = {name.rpartition(".")[2] for name, m in model.named_modules() if adapter in getattr(m, "settings", {})}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        model.set_adapter(adapter)
        assert torch.isfinite(model(ids).logits).all()
