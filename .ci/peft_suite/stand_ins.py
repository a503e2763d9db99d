"""Tiny random models and tokenizers under the names that PEFT's tests ask the hub for.

They are written as a cache of the hub, which transformers reads when it is offline. No test needs a network then. A
stand-in has the architecture of the original, but other sizes and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

COMMIT = "0" * 40  # the hub names a snapshot by its commit
VOCABULARY = 300  # 256 bytes and a few special tokens
LAYERS = 2
HEADS = 4
HIDDEN = 16

# Weights of the usual size would leave hidden states so small that an adapter hardly changes the output.
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 3,  # PEFT's inputs have 1, and the embedding of the padding is zero
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_LLAMA: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA4 = {**_EXPERTS, "intermediate_size_mlp": 2 * HIDDEN, "head_dim": 4, "interleave_moe_layer_step": 1}
_GPT_OSS = {**_EXPERTS, "head_dim": 8, "max_position_embeddings": 131072}  # YaRN extends a length to this one
_GPT = {**_TOKENS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
_BERT = {**_LLAMA, "type_vocab_size": 2}
_OPT = {**_LLAMA, "ffn_dim": 2 * HIDDEN, "word_embed_proj_dim": HIDDEN}
_T5 = {
    **_TOKENS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "d_model": HIDDEN,
    "d_ff": 2 * HIDDEN,
    "d_kv": HIDDEN // HEADS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}
_BART = {
    **_TOKENS,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 128,
}
_DEBERTA = {**_BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}

# Class of the model, class of its config and the config's options, by name on the hub.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GROUPED, "head_dim": 8},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", "GptOssConfig", _GPT_OSS),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _GROUPED,
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {**_LLAMA, "projection_dim": HIDDEN},
    ),
}
# An adapter of which the tests of configs read the config, at a revision.
ADAPTER = ("peft-internal-testing/tiny-opt-lora-revision", "test")


def make_stand_ins(cache: Path) -> None:
    """Write the models that the cache lacks, and the adapter.

    Args:
        cache: Folder that `HF_HUB_CACHE` names.
    """
    for name, (model_class, config_class, options) in MODELS.items():
        with _snapshot(cache, name) as folder:
            if folder is not None:
                torch.manual_seed(0)
                config = getattr(transformers, config_class)(**options)
                model: PreTrainedModel = getattr(transformers, model_class)(config)
                model.save_pretrained(folder)
                _byte_tokenizer().save_pretrained(folder)
    with _snapshot(cache, *ADAPTER) as folder:
        if folder is not None:
            LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m").save_pretrained(str(folder))


@contextmanager
def _snapshot(cache: Path, name: str, revision: str = "main") -> Iterator[Path | None]:
    """Give the folder that the files of a repository belong in, or None if it is complete."""
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    if reference.exists():
        yield None
        return
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(COMMIT, encoding="utf-8")  # last, so that a repository with a reference is complete


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte."""
    special = ["<s>", "<unk>", "</s>", "<pad>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
