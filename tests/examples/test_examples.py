"""Every example runs, from another folder, with two steps and a tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import malora
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"sft_trainer": "trl", "qlora": "bitsandbytes", "accelerate_loop": "accelerate"}
OWN_MODEL = ("train_adapter", "trainer", "captured_loop")  # make a model with random weights
TRAIN = [path.stem for path in EXAMPLES if path.stem != "score_with_lm_eval"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Return the folder of a model whose words are numbers and signs."""
    folder = tmp_path_factory.mktemp("tiny")
    words = [str(i) for i in range(50)] + ["What", "is", "+", "?", "<unk>", "<pad>", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(example, tmp_path, *arguments, **options):
    done = processes.run(ROOT / "examples" / f"{example}.py", *arguments, folder=tmp_path, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", TRAIN)
def test_an_example_runs_and_saves_its_adapter(example, tiny_model, tmp_path):
    if (package := NEEDS.get(example)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    model = [] if example in OWN_MODEL else ["--model", tiny_model]
    printed = run(
        example,
        tmp_path,
        "--steps",
        "2",
        "--output",
        tmp_path / "adapter",
        *model,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "balance loss" in printed or "aux_loss" in printed


def test_an_adapter_is_scored_with_lm_eval(tiny_model, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, malora.METHODS["malora"](r=4, lora_alpha=8, d=8)).save_pretrained(tmp_path / "adapter")
    items = [{"question": f"What is {i} + 1 ?", "choices": [str(i + 1), "7"], "answer": 0} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    printed = run(
        "score_with_lm_eval", tmp_path, "--model", tiny_model, "--adapter", tmp_path / "adapter",
        "--tasks", "sums", "--task-folder", tmp_path, "--limit", "3",
    )  # fmt: skip
    assert "|sums |" in printed and "acc" in printed


def test_the_readme_lists_every_example():
    text = (ROOT / "examples" / "README.md").read_text()
    assert all(f"({example.name})" in text for example in EXAMPLES)
