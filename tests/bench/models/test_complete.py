"""Bases whose config, weights and tokenizer contradict each other are refused before memory is taken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.models.base import load, prepare
from tests.bench.cli.helpers import refused


@pytest.fixture
def base(base_folder, tmp_path):
    """A copy of a base, and a function that changes values of one of its JSON files."""
    folder = shutil.copytree(base_folder, tmp_path / "base")

    def change(name, **values):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return folder, change


@pytest.mark.parametrize("values, message", [
    ({"hidden_size": 10**9}, "config.json describes .* weights, and the files have"),
    ({"intermediate_size": 10**9}, "config.json describes"),
    ({"vocab_size": 10**9}, "config.json describes"),
    ({"head_dim": 10**9}, "config.json describes"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers of config.json is 1,000,000,000, and at most 1,000 are read"),
    ({"num_hidden_layers": 10**40}, "num_hidden_layers of config.json is above 10"),
    ({"num_hidden_layers": 4}, "the files have no model.layers.2.input_layernorm.weight, .* and 15 more"),
    ({"rms_norm_eps": -1e9}, "its logits are not finite"),
    ({"hidden_act": "gelu_"}, "is not a complete causal language model"),
])  # fmt: skip
def test_sizes_of_a_config(values, message, base):
    folder, change = base
    change("config.json", **values)
    with pytest.raises(UserError, match=message):
        load(prepare(str(folder)), torch.device("cpu"))


def test_a_missing_tensor(base):
    folder, _ = base
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]  # transformers would set it to ones, with a warning
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the files have no model\.norm\.weight, which config.json asks for"):
        load(prepare(str(folder)), torch.device("cpu"))


@pytest.mark.parametrize("values, message", [
    ({"tokenizer_object": "x"}, "is not a complete causal language model"),
    ({"model_max_length": "x"}, "is not a complete causal language model"),
    ({"pad_token": "<new>"}, "the tokenizer's pad_token is number 177, and the model embeds 177"),
])  # fmt: skip
def test_values_of_a_tokenizer(values, message, base, capsys, tmp_path):
    folder, change = base
    change("tokenizer_config.json", **values)
    command = ["run", "--profile", "tiny", "--model", folder, "--results", tmp_path / "results", "--max-steps", 1]
    assert message in refused(command, capsys, tmp_path)
