"""Adapters go to the hub and come back: a stand-in for the hub, and real requests of the libraries."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from bench.models.adapters import BASE_FILE
from bench.records import provenance
from tests.hub_stand_in import HubStandIn


@pytest.fixture(scope="module")
def uploaded(base_folder, tmp_path_factory):
    """A hub with a base and adapters, and the logits of `through_the_hub`."""
    out = tmp_path_factory.mktemp("hub")
    with HubStandIn() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.models.through_the_hub", base_folder, out],
            env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(str(out / "cache"))},
            cwd=provenance.ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not hub.not_understood
    return hub, torch.load(out / "logits"), out


@pytest.mark.parametrize("adapter, way", [
    (adapter, way) for adapter in ("saved", "plain") for way in ("PeftModel", "AutoModel", "AutoPeftModel")
] + [("saved", "bench score")])  # fmt: skip
def test_an_adapter_from_the_hub_computes_as_before(adapter, way, uploaded):
    _, logits, _ = uploaded
    torch.testing.assert_close(logits[adapter][way], logits[adapter]["before"])
    assert not torch.allclose(logits[adapter][way], logits[adapter]["base"], atol=1e-3)


def test_the_hub_has_every_file_as_it_was_saved(uploaded):
    hub, _, out = uploaded
    saved = {file.name: file.read_bytes() for file in (out / "saved").iterdir()}
    assert {name: hub.files("someone/saved")[name] for name in saved} == saved
    assert set(saved) == {"README.md", "adapter_config.json", "adapter_model.safetensors", BASE_FILE}


def test_config_card_and_hash_name_the_commit_of_the_base(uploaded):
    hub, _, _ = uploaded
    files = hub.files("someone/saved")
    commit = list(hub.commits["someone/base"])[1]  # after the empty one
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", commit)
    assert "import malora" in config["requires"]
    assert json.loads(files[BASE_FILE]) == {"name": "someone/base", "hash": commit}
    card = ModelCard(files["README.md"].decode())
    about = card.data.to_dict()
    assert about["base_model"] == "someone/base" and about["library_name"] == "peft"
    assert f'from_pretrained("someone/base", revision="{commit}")' in card.content


def test_a_plain_push_names_its_base_and_what_to_import(uploaded):
    hub, _, _ = uploaded
    files = hub.files("someone/plain")
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "someone/base" and "import malora" in config["requires"]


def test_the_commit_in_the_config_protects_from_a_changed_base(uploaded):
    """PEFT's class reads it. transformers' class takes the newest base, as for every adapter."""
    _, logits, _ = uploaded
    before = logits["saved"]["before"]
    torch.testing.assert_close(logits["saved"]["AutoPeftModel, other base"], before)
    assert not torch.allclose(logits["saved"]["AutoModel, other base"], before)
