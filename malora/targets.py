"""Default targets: the modules that a method adapts if the user names none.

The paper adapts Q, K, V, Up, Down and Gate, and not the attention's output: with it, the paper's parameter shares do
not come out. Each family of models has names of its own for these layers. Fused expert weights of transformers 5
(Mixtral's, for example) are no modules and are left out.
"""

from __future__ import annotations

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

_LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
_NEOX = ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"]
_OPT = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
_GPT2 = ["c_attn", "c_fc", "mlp.c_proj"]  # "c_proj" alone would be the attention's output too

_PAPER_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "stablelm"],
        _LLAMA,
    ),
    **dict.fromkeys(["llama4_text", "gemma4_text"], _LLAMA),
    "mixtral": ["q_proj", "k_proj", "v_proj"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    **dict.fromkeys(["gpt_neox", "bloom", "falcon", "RefinedWeb", "RefinedWebModel", "chatglm"], _NEOX),
    **dict.fromkeys(["opt", "phi", "bart", "blip-2"], _OPT),
    "llama4": [*_LLAMA, "fc1", "fc2"],  # the last two are its vision tower's
    **dict.fromkeys(["gpt2", "gpt_bigcode", "btlm"], _GPT2),
    "gpt_neo": ["q_proj", "k_proj", "v_proj", "c_fc", "mlp.c_proj"],
    "gptj": ["q_proj", "k_proj", "v_proj", "fc_in", "fc_out"],
    "codegen": ["qkv_proj", "fc_in", "fc_out"],
    "mpt": ["Wqkv", "up_proj", "down_proj"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "ffn.key", "ffn.value"],
}

# By `model_type`. Types of which we know no better, such as encoders, have the targets of PEFT's LoRA.
TARGET_MODULES: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,  # type: ignore[dict-item]  # inferred as Sequence
    **_PAPER_TARGETS,
    # The linear layers of its vision and audio towers are of a class that no LoRA takes.
    "gemma4": rf".*language_model\..*\.({'|'.join(_LLAMA)})",
}

# PEFT's LoRA asks no table of ours, but skips names that match nothing. With all names it adapts what TARGET_MODULES
# says for every type of `_PAPER_TARGETS`, and finds nothing in a model of another type, which is an error.
ALL_PAPER_TARGETS = sorted({name for names in _PAPER_TARGETS.values() for name in names})
