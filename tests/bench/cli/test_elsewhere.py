"""Adapters that leave the benchmark with their base and a card, and adapters that enter it from elsewhere."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import malora
from bench.cli.parser import main
from bench.evaluate.lm_eval_model import LabelPositionLM
from bench.experiments.profiles import PROFILES
from bench.models.adapters import BASE_FILE, add_adapter, save_adapter
from bench.models.base import BaseModel, load, prepare
from bench.records import store
from bench.report.model_card import model_card
from tests.bench.cli.helpers import refused, snapshot
from tests.bench.records.test_store import make

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
IDS = torch.arange(3, 19).view(2, 8)


def call(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """A folder that `bench run --save` wrote, and its record."""
    folder = tmp_path_factory.mktemp("saved")
    options = ["--profile", "tiny", "--model", base_folder, "--max-steps", 2, "--max-items", 3, "--results", folder]
    assert call("run", "--method", "malora", *options, "--save", folder / "adapter") == 0
    (record,) = store.read_all(folder)
    return folder / "adapter", record


def test_a_saved_adapter_opens_with_plain_peft(saved, base_folder):
    folder, _ = saved
    config = PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == str(base_folder.resolve()) and config.revision is None
    assert json.loads((folder / BASE_FILE).read_text())["hash"] == prepare(str(base_folder)).hash
    alone = AutoPeftModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    torch.testing.assert_close(alone(IDS).logits, model(IDS).logits)


def test_the_card_is_written_from_the_record(saved, base_folder):
    folder, record = saved
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and "malora" in data["tags"] and "base_model" not in data
    program = card.content.partition("```python\n")[2].partition("```")[0]
    assert program.startswith("import malora")
    compile(program, "card", "exec")
    for text in ("MALoRA", "procedural", record.id, "cut short", "pip install malora", f"`{record.config.model}`"):
        assert text in card.content
    assert str(base_folder) not in card.content  # no path of this machine
    score = record.test["lexicon"]
    assert f"{100 * score.value:.1f} ± {196 * score.stderr:.1f}" in card.content


def test_the_card_of_a_hub_model_names_its_commit():
    record = make()
    record = record.replace(config=record.config.replace(model="someone/model", model_hash="c" * 40))
    card = ModelCard(model_card(record, commit="c" * 40))
    assert card.data.base_model == "someone/model"
    assert f'from_pretrained("someone/model", revision="{"c" * 40}")' in card.content
    assert "import malora" not in card.content  # of the method lora


def test_the_card_of_a_built_in_model_says_how_to_make_it():
    record = make()
    record = record.replace(config=record.config.replace(model="smollm2-135m", method="malora"))
    card = ModelCard(model_card(record, commit=None))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert 'prepare("smollm2-135m").path' in card.content


def test_the_base_is_checked_by_its_hash(saved, base_folder, tmp_path, capsys):
    folder = shutil.copytree(saved[0], tmp_path / "adapter")
    command = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", folder, "--max-items", 2]
    assert call(*command) == 0
    other = json.loads((folder / BASE_FILE).read_text()) | {"name": "another", "hash": "f" * 64}
    (folder / BASE_FILE).write_text(json.dumps(other))
    assert "was trained on another (ffffffffffff), not on random-llama" in refused(command, capsys, tmp_path)
    (folder / BASE_FILE).write_text("[]")
    assert "base_model.json is broken" in refused(command, capsys, tmp_path)


def with_tensors(change):
    """Replace the tensors of a saved adapter by others."""

    def spoil(folder):
        weights = folder / "adapter_model.safetensors"
        save_file(dict(filter(None, (change(*pair) for pair in load_file(weights).items()))), weights)

    return spoil


def as_bin(folder):
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


LAYER = "model.layers.1."
INCOMPLETE = {
    "no file": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "another format": (as_bin, "has no adapter_model.safetensors"),
    "a link to nothing": (
        lambda folder: (as_bin(folder), (folder / "adapter_model.safetensors").symlink_to("nothing")),
        "has no adapter_model.safetensors",
    ),
    "no tensor": (with_tensors(lambda name, tensor: None), "lacks 48 tensors of the adapter (base_model.model."),
    "no layer": (
        with_tensors(lambda name, tensor: None if LAYER in name else (name, tensor)),
        "lacks 24 tensors of the adapter (base_model.model.model.layers.1.",
    ),
    "renamed layer": (
        with_tensors(lambda name, tensor: (name.replace(LAYER, "model.layers.9."), tensor)),
        "and has 24 that are none of it (base_model.model.model.layers.9.",
    ),
    "renamed factor": (
        with_tensors(lambda name, tensor: (name.replace("malora_S", "malora_T"), tensor)),
        "and has 12 that are none of it",
    ),
    "NaN": (
        with_tensors(lambda name, tensor: (name, tensor * float("nan"))),
        "has values that are not finite in 48 of 48 tensors (base_model.model.",
    ),
    "one NaN": (
        with_tensors(lambda name, tensor: (name, tensor.index_fill(-1, torch.tensor([0]), float("nan")))),
        "has values that are not finite in 48 of 48 tensors",
    ),
    "another shape": (
        with_tensors(lambda name, tensor: (name, tensor[..., :1].clone())), "it was trained on another base"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_an_incomplete_adapter_is_not_scored(kind, saved, base_folder, tmp_path, capsys):
    """PEFT would leave what is missing at its random start, and the scores would look like any others."""
    folder = shutil.copytree(saved[0], tmp_path / "adapter")
    spoil, message = INCOMPLETE[kind]
    spoil(folder)
    command = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", folder, "--record"]
    assert message in refused([*command, "--results", tmp_path / "results"], capsys, tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_adapters_of_former_versions_still_load(changed, saved, base_folder, tmp_path, capsys):
    """They name their base as NAME@HASH, with the hash of its weights."""
    folder = shutil.copytree(saved[0], tmp_path / "adapter")
    (folder / BASE_FILE).unlink()
    config, base = folder / "adapter_config.json", prepare(str(base_folder))
    name = f"{base.name}@{'f' * 12 if changed else base.former_hash[:12]}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    command = ["score", "--profile", "tiny", "--model", base_folder, "--adapter", folder, "--max-items", 2]
    if changed:
        assert "was trained on random-llama@ffffffffffff" in refused(command, capsys, tmp_path)
    else:
        assert call(*command) == 0


def test_a_hub_model_is_named_with_its_commit(base_folder, tmp_path):
    base = BaseModel(base_folder, "someone/model", "c" * 40, former_hash="c" * 40, commit="c" * 40)
    model, _ = load(base, torch.device("cpu"))
    save_adapter(add_adapter(model, "malora", {}, seed=0), base, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == ("someone/model", "c" * 40)


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_an_adapter_from_elsewhere_enters_the_leaderboard(method, base_folder, tmp_path, capsys, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    options = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=4, **options) if method == "lora" else malora.METHODS["malora"](r=4, d=8, **options)
    get_peft_model(model, config).save_pretrained(tmp_path / "mine", save_embedding_layers=False)
    options = ["--profile", "tiny", "--model", base_folder, "--max-items", 3, "--results", tmp_path / "results"]
    options += ["--max-steps", 2]  # of the table's runs; records of one table agree in it
    command = ["score", "--adapter", tmp_path / "mine", *options]
    assert call(*command) == 0
    assert not (tmp_path / "results").exists()
    with monkeypatch.context() as patched:
        patched.setattr(store, "write", interrupt)
        assert call(*command, "--record") == 130
    (answers,) = (path for path in snapshot(tmp_path / "results") if path.suffix == ".answers")
    with monkeypatch.context() as patched:
        patched.setattr(LabelPositionLM, "_label_likelihoods", lambda *a: pytest.fail("scored again"))
        assert call(*command, "--record") == 0
    assert not answers.exists()
    assert "recorded in" in capsys.readouterr().out
    (record,) = store.read_all(tmp_path / "results")
    assert record.config.method.startswith("elsewhere-mine-") and record.config.learning_rate is None
    assert call(*command, "--record") == 0  # found again
    assert len(store.read_all(tmp_path / "results")) == 1

    table = ["table2", "--methods", "lora", "--seeds", 1, "--jobs", 1, *options]
    assert call(*table) == 0
    page = (tmp_path / "results" / "table2.md").read_text()
    rows = [line for line in page.splitlines() if "trained elsewhere" in line]
    assert rows and all(row.startswith("| mine-") for row in rows)
    assert PROFILES["tiny"].name in page
