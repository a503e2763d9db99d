"""Score an adapter that was trained elsewhere, as a run of its own."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from bench.evaluate.score import score
from bench.experiments.methods import BASE, ELSEWHERE
from bench.models.adapters import load_adapter
from bench.models.base import load, prepare
from bench.records import provenance
from bench.records.schema import DataSection, Record, RunConfig, TaskScore
from bench.runs.run import open_journal, score_options
from bench.runs.setting import RunSettings, load_data, make_run_config


def score_elsewhere(config: RunConfig, setting: RunSettings, folder: Path, *, keep: bool = False) -> Record:
    """Score a saved adapter of any PEFT type, and return its record, which is not written.

    How the adapter was trained is unknown, and so is whether it has seen items of the test sets.

    Args:
        config: The adapter's configuration, of `elsewhere_config`.
        setting: Settings of the scoring.
        folder: Folder of the adapter.
        keep: Keep the model's answers in the folder of results, so that scoring goes on after a kill. Remove them with
            `bench.runs.run.remove_unfinished`.

    Raises:
        UserError: The adapter is incomplete, or of another base model.
    """
    if setting.profile.threads:
        torch.set_num_threads(setting.profile.threads)
    data = load_data(setting, config.seed)
    base = prepare(setting.model)
    model, tokenizer = load(base, setting.device)
    adapted = load_adapter(model, base, folder)
    tests = {task: items[: setting.max_items] for task, items in data.test.items()}
    made_by = provenance.provenance(setting.device, jobs=1)
    options = score_options(setting)
    if keep:
        options["recall"] = open_journal(config, setting, made_by, adapted).recall
    results, items, gold = score(adapted, tokenizer, tests, **options, progress_of=config.id)
    return Record(
        config=config,
        status="ok",
        provenance=made_by,
        data=DataSection(sha256=data.sha256, dropped=data.dropped, dropped_validation=data.dropped_validation),
        test={task: TaskScore(**result) for task, result in results.items()},
        items=items,
        gold=gold,
    )


def elsewhere_config(setting: RunSettings, folder: Path) -> RunConfig:
    """Return the configuration of an adapter from elsewhere, which its files identify.

    Settings of training are those of the profile, so that the record is comparable with its table. They say nothing of
    the adapter: it has no learning rate.
    """
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    name = re.sub(r"[^A-Za-z0-9._]+", "-", folder.resolve().name)
    return make_run_config(setting, BASE, 0).replace(
        method=f"{ELSEWHERE}{name}-{digest.hexdigest()[:8]}", method_options={"adapter_sha256": digest.hexdigest()}
    )
