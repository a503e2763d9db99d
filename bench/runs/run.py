"""One run from its configuration to its record, and many of them side by side."""

from __future__ import annotations

import math
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedTokenizerBase

import malora
from bench.errors import UserError
from bench.evaluate.adapter_analysis import analyze_adapter
from bench.evaluate.score import require_scoring, score
from bench.experiments.methods import BASE
from bench.models.adapters import add_adapter, count_parameters
from bench.models.base import load, prepare, targets
from bench.records import provenance
from bench.records import store as records
from bench.records.schema import DataSection, InsideSection, Parameters, Record, RunConfig, TaskScore, TrainSection
from bench.runs.setting import RunSettings, blend_seed, load_data, processes
from bench.train.batching import Encoded, encode, label_tokens
from bench.train.checkpoint import TrainLog
from bench.train.loop import DivergedError, train
from malora.analysis.experts import experts
from tasks import MIXTURES


def run(config: RunConfig, setting: RunSettings, jobs: int = 1) -> Record:
    """Make a run, or give back its record if the results folder has it. Failures of a run are recorded, not raised.

    Every process of `accelerate launch` gives back the record that the first one wrote.

    Raises:
        UserError: the run cannot be made as it was asked for.
        torch.OutOfMemoryError: one of several `jobs` found no room, which says nothing of it. There is no record.
    """
    state = processes()
    _limit_threads(setting.profile.threads)
    if found := find_record(config, setting):
        return found
    require_scoring(MIXTURES[config.mixture].tasks, setting.unsafe_code)
    checkpoint = setting.results / "checkpoints" / f"{config.id}.pt"
    record = Record(config=config, status="ok", provenance=provenance.provenance(setting.device, jobs))
    try:
        _train_and_score(record, setting, checkpoint)
    except DivergedError as error:
        record.status, record.error, record.train = "diverged", str(error), _train_section(error.log)
    except UserError:
        raise  # nothing of the run is to blame
    except torch.OutOfMemoryError as error:
        if jobs > 1:
            checkpoint.unlink(missing_ok=True)  # what goes on from it would have another's seconds
            raise
        record.status, record.error = "oom", str(error)
    except Exception as error:
        record.status, record.error = "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        if state.num_processes > 1:
            raise  # the others wait for this process in the middle of a step; the launcher ends them
    if state.is_main_process:
        records.write(record, setting.results)
        if record.status != "failed":
            checkpoint.unlink(missing_ok=True)
    state.wait_for_everyone()
    if not state.is_main_process:
        record = records.find(config, setting.results)
    clear_device_cache(garbage_collection=True)
    return record


def _train_and_score(record: Record, setting: RunSettings, checkpoint: Path) -> None:
    config, profile = record.config, setting.profile
    data = load_data(setting, config.seed)
    model, tokenizer = load(prepare(setting.model), setting.device)
    fresh = None
    record.data = DataSection(sha256=data.sha256, dropped=data.dropped, dropped_validation=data.dropped_validation)
    if config.method != BASE:
        options = {"target_modules": targets(prepare(setting.model)), **config.method_options}
        model = add_adapter(model, config.method, options, config.seed)
        fresh = experts(model) if malora.has_router(model) else None
        record.parameters = Parameters(**count_parameters(model))
        encoded = _encoded(setting, config, tokenizer)
        record.data = record.data.replace(train=label_tokens(data.train, encoded))
        torch.manual_seed(config.seed)
        log = train(
            model,
            encoded,
            config,
            pad_id=tokenizer.pad_token_id or 0,
            checkpoint=checkpoint,
            checkpoint_every=profile.checkpoint_every,
        )
        record.train = _train_section(log)
        if setting.save and processes().is_main_process:
            model.save_pretrained(setting.save, save_embedding_layers=False)
    if not processes().is_main_process:
        return
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # of training's graphs; other runs may share the GPU
    if fresh:
        prompts = {task: [e.prompt for e in items] for task, items in _limited(data.validation, config).items()}
        record.inside = InsideSection(**_rounded(analyze_adapter(model, tokenizer, fresh, prompts, setting.peers)))
    start = time.perf_counter()
    score_with = score_options(setting)
    if config.method != BASE:
        validation, _ = score(model, tokenizer, _limited(data.validation, config), **score_with)
        record.validation = {task: TaskScore(**one) for task, one in validation.items()}
    test, record.items = score(model, tokenizer, _limited(data.test, config), **score_with)
    record.test = {task: TaskScore(**one) for task, one in test.items()}
    if record.train:
        record.train.seconds["evaluation"] = time.perf_counter() - start


def score_options(setting: RunSettings) -> dict[str, Any]:
    """How the setting has `score` work."""
    profile = setting.profile
    return {
        "format": profile.format,
        "batch_size": profile.eval_batch_size,
        "generation_batch_size": profile.generation_batch_size,
        "unsafe_code": setting.unsafe_code,
    }


def _train_section(log: TrainLog) -> TrainSection:
    return TrainSection(**vars(log) | {"curve": _rounded(log.curve), "router": _rounded(log.router)})


def _rounded(value: Any) -> Any:
    """Five digits are plenty, and keep a record small. JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _limited(examples: dict[str, list], config: RunConfig) -> dict[str, list]:
    return {name: items[: config.max_items] for name, items in examples.items()}


_ENCODED: dict[tuple, list[Encoded]] = {}  # of the last run, since the next one mostly trains on the same


def _encoded(setting: RunSettings, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    seed = blend_seed(setting, config.seed)
    key = (config.model_hash, setting.mixture_name, setting.source, setting.profile.format, seed, config.max_length)
    if key not in _ENCODED:
        _ENCODED.clear()
        _ENCODED[key] = encode(tokenizer, load_data(setting, config.seed).train, config.max_length)
    return _ENCODED[key]


def find_record(config: RunConfig, setting: RunSettings) -> Record | None:
    """The run's record, unless it is to leave an adapter and has not: then the run is made again."""
    found = records.find(config, setting.results)
    return None if found and found.status == "ok" and setting.save and not setting.save.is_dir() else found


def _limit_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
