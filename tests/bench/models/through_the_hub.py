"""Bring a base model and adapters to the hub and back. `test_hub.py` runs this program against a stand-in.

Libraries read the address of the hub when they are imported, so it needs a process of its own.
"""

import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

import malora
from bench.cli.parser import main
from bench.models.adapters import load_adapter
from bench.models.base import load, prepare

BASE, SAVED, PLAIN = "someone/base", "someone/saved", "someone/plain"
IDS = torch.arange(3, 19).view(2, 8)


def run(base: str, out: Path) -> None:
    """Upload a base and two adapters, and write logits from before and after, by adapter and way to load it."""
    hub = HfApi()
    hub.create_repo(BASE)
    hub.upload_folder(repo_id=BASE, folder_path=base)
    options = ["--profile", "tiny", "--model", BASE, "--max-steps", "2", "--max-items", "3"]
    options += ["--results", str(out / "results")]
    saving = ["--learning-rate", "0.1", "--save", str(out / "saved")]
    assert main(["run", "--method", "malora", *options, *saving]) == 0
    hub.create_repo(SAVED)
    hub.upload_folder(repo_id=SAVED, folder_path=out / "saved")  # what `hf upload` does

    torch.manual_seed(0)
    config = malora.METHODS["malora"](r=4, d=8, num_experts=4, task_type="CAUSAL_LM", init_weights=False)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    plain.push_to_hub(PLAIN)

    identity, cpu = prepare(BASE), torch.device("cpu")
    models = {"saved": load_adapter(load(identity, cpu)[0], identity, out / "saved"), "plain": plain}
    logits = {}
    for name, model in models.items():
        logits[name] = {"base": load(identity, cpu)[0], "before": model, **fetched(f"someone/{name}")}
    folder = Path(snapshot_download(SAVED))
    assert main(["score", "--adapter", str(folder), *options]) == 0  # it checks the hash of the base
    logits["saved"]["bench score"] = load_adapter(load(identity, cpu)[0], identity, folder)
    # Later the base changes on the hub.
    hub.upload_file(repo_id=BASE, path_in_repo="model.safetensors", path_or_fileobj=other_weights(base))
    logits["saved"] |= {f"{way}, other base": model for way, model in fetched(SAVED).items()}
    with torch.no_grad():
        torch.save(
            {name: {way: model.eval()(IDS).logits for way, model in ways.items()} for name, ways in logits.items()},
            out / "logits",
        )


def fetched(adapter: str) -> dict[str, torch.nn.Module]:
    """Load an adapter from the hub in three ways."""
    return {
        "PeftModel": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), adapter),
        "AutoModel": AutoModelForCausalLM.from_pretrained(adapter),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(adapter),
    }


def other_weights(base: str) -> bytes:
    """Return the weights of a base model with another embedding, as safetensors."""
    weights = load_file(Path(base) / "model.safetensors")
    return save({name: weight * 2 if "embed" in name else weight for name, weight in weights.items()}, {"format": "pt"})


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
