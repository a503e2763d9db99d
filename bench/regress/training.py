"""Figures of the tiny profile: prompts and data, two short runs, and gradients of the adapters that they save.

The profile computes with one thread, so that its figures are the same in each repetition.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import malora
from bench.experiments.profiles import PROFILES
from bench.models.adapters import add_adapter
from bench.models.base import load, prepare, targets
from bench.records.schema import Record
from bench.regress.figures import Figures, Measured
from bench.runs.run import encode_training_data, run
from bench.runs.setting import RunSettings, make_run_config
from bench.runtime.processes import make_accelerator
from bench.train.batching import PACKED_ROW_LENGTH, Batch, collate
from bench.train.step import TrainStep
from tasks import FORMATS, MIXTURES, build

PROFILE = PROFILES["tiny"]
MIXTURES_OF_PROFILE = (PROFILE.mixtures["intra"], PROFILE.mixtures["inter"])  # the others are parts of them
METHODS = ("lora", "malora")  # PEFT's LoRA shows whether a figure moved for all methods
STEPS, ITEMS = 50, 100  # 50 steps have one reading of the router statistics
# At ten times this rate other instruction sets route tokens to other experts within 50 steps, and bounds are wide.
LEARNING_RATE = PROFILE.paper_rate
RELATIVE = 1e-3  # smallest bound of a number on other machines, relative to it
SCORE = 0.03  # the same of a score: three of `ITEMS` answers


def measure_data() -> Figures:
    """Return a hash of all formatted examples, for each mixture of the profile, prompt format and split."""
    found: Figures = {}
    for mixture in MIXTURES_OF_PROFILE:
        for format in FORMATS:
            data = build(MIXTURES[mixture], PROFILE.source, format=format, seed=0)
            found |= {f"data.{mixture}.{format}.{split}": Measured(h, "exact") for split, h in data.sha256.items()}
    return found


def measure_training() -> Figures:
    """Make short runs with fixed seeds, and return their figures.

    A run that fails has its status as its only figure, and its error is printed.
    """
    found = {"training.base": Measured(prepare(PROFILE.model).hash, "exact")}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            found |= {f"training.{method}.{name}": figure for name, figure in _figures_of(method, Path(folder)).items()}
    return found


def _figures_of(method: str, folder: Path) -> Figures:
    profile = PROFILE.on(PROFILE.mixtures["intra"])
    setting = RunSettings(
        profile=profile,
        model=profile.model,
        source=profile.source,
        mixture="intra",
        results=folder,
        max_steps=STEPS,
        max_items=ITEMS,
        save=folder / "adapter",
    )
    record = run(make_run_config(setting, method, seed=0, learning_rate=LEARNING_RATE), setting)
    if record.status != "ok":
        print(record.error, file=sys.stderr)
        return {"status": Measured(record.status, "exact")}
    return {"status": Measured("ok", "exact")} | _figures_of_record(record) | _gradients(record, setting)


def _figures_of_record(record: Record) -> Figures:
    """Return figures of a complete record: sizes, curve, router, analysis and scores."""
    assert record.parameters and record.train and record.validation and record.test, "the run is ok"
    found = {
        f"parameters.{name}": Measured(value, "exact") for name, value in record.parameters.model_dump().items()
    } | {"tokens": Measured(record.train.tokens, "exact")}
    for point in record.train.curve:
        for name in ("loss", "balance_loss", "grad_norm"):
            if value := getattr(point, name):  # without a router the balance loss is 0
                found[f"step{point.step}.{name}"] = _number(value)
    for router in record.train.router:
        for name in ("entropy", "gate_sum", "largest_share"):
            found[f"router.{name}"] = _number(getattr(router, name))
    if record.inside:
        found["analysis.angle"] = _number(record.inside.movement.angle)
        found["analysis.stable_rank"] = _number(record.inside.spectra["A"].stable_rank or 0.0)
    found["validation.mean"] = Measured(_short((record.mean("validation") or 0.0) / 100), "number", SCORE)
    for task, score in record.test.items():
        found[f"test.{task}"] = Measured(_short(score.value), "number", SCORE)
    return found


def _gradients(record: Record, setting: RunSettings) -> Figures:
    """Return figures of the gradients of one batch, by kind of factor.

    The adapter is the trained one: a new adapter's B is zero, so no other factor would have a gradient of the task.
    The gradients of the task and of the balance loss are measured apart, because either may be lost.
    """
    base, tokenizer = load(prepare(setting.model), setting.device)
    options = {"target_modules": targets(prepare(setting.model)), **record.config.method_options}
    model = add_adapter(base, record.config.method, options, seed=0)
    assert setting.save is not None
    set_peft_model_state_dict(model, load_file(setting.save / "adapter_model.safetensors"))
    model.eval()  # without dropout
    encoded = encode_training_data(setting, record.config, tokenizer)[: record.config.batch_size]
    batches = collate(encoded, tokenizer.pad_token_id or 0, row_length=PACKED_ROW_LENGTH[setting.device.type])
    of_task = _backward(model, batches, balance_factor=0.0)
    found = _by_kind("gradient", of_task)
    if malora.has_router(model):
        of_both = _backward(model, batches, balance_factor=1.0)
        balance = {name: both - of_task[name] for name, both in of_both.items() if "router" in name}
        found |= _by_kind("gradient", balance, suffix="_of_balance_loss")
    return found


def _backward(model: PeftModel, batches: list[Batch], balance_factor: float) -> dict[str, Tensor]:
    """Return the gradients of a batch by the name of the parameter; they are zero where there are none."""
    model.zero_grad()
    TrainStep(model, model, make_accelerator("no"), balance_factor)(batches)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _by_kind(title: str, gradients: dict[str, Tensor], suffix: str = "") -> Figures:
    """Return, by kind of factor, the norm of the gradients and the number of tensors without one."""
    kinds: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        kind = next(part for part in name.split(".") if part.startswith(("lora_", "malora_")))
        kinds.setdefault(kind.partition("_")[2] + suffix, []).append(gradient)
    found = {}
    for kind, tensors in kinds.items():
        norm = torch.stack([tensor.norm() for tensor in tensors]).norm().item()
        found[f"{title}.{kind}.zero_tensors"] = Measured(sum(not tensor.any() for tensor in tensors), "exact")
        found[f"{title}.{kind}.norm"] = _number(norm)
    return found


def _number(value: float) -> Measured:
    return Measured(_short(value), "number", RELATIVE * abs(value))


def _short(value: float) -> float:
    """Round to five digits, as records do."""
    return float(f"{value:.5g}")
