"""Make one run: train an adapter, analyze it, score it and write its record."""

from __future__ import annotations

import json
import math
import time
import traceback
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import malora
from bench.errors import UserError
from bench.evaluate.adapter_analysis import analyze_adapter
from bench.evaluate.answer_journal import AnswerJournal
from bench.evaluate.score import require_scoring, score
from bench.experiments.methods import BASE
from bench.models.adapters import add_adapter, count_parameters, hash_adapter, save_adapter
from bench.models.base import load, prepare, targets
from bench.models.joint import ALONE
from bench.records import provenance
from bench.records import store as records
from bench.records.claims import Claim
from bench.records.leftovers import JOURNAL, is_disk_full, remove_failures, temporary_files_removed
from bench.records.schema import (
    DataSection,
    InsideSection,
    Parameters,
    Provenance,
    Record,
    RunConfig,
    TaskScore,
    TrainSection,
)
from bench.runs.calibration import seconds_per_trained_token
from bench.runs.setting import RunSettings, blend_seed, load_data
from bench.runs.work import first_step, time_left, work_of
from bench.runtime.attention import require_packing
from bench.runtime.processes import processes
from bench.runtime.progress import print_line, timed_phase
from bench.train.batching import Encoded, encode, label_tokens
from bench.train.checkpoint import TrainLog, previous_checkpoint, remove_checkpoints
from bench.train.gate_scale import match_first_batch
from bench.train.loop import DivergedError, train
from bench.train.together import Trained
from bench.train.tracking import Log, tracked
from malora.analysis import extract_experts
from tasks import MIXTURES, Example


def run(
    config: RunConfig,
    setting: RunSettings,
    jobs: int = 1,
    trained: Trained | None = None,
    claim: Claim | None = None,
) -> Record:
    """Make a run and return its record, or return the existing record.

    An existing record is one that the results folder already has.

    A run that fails is recorded with its status and error, and nothing is raised. If several processes share the run,
    the first one writes the record and the others return it. A failure in one of several processes is raised.

    Args:
        config: Configuration of the run.
        setting: Settings that it shares with others.
        jobs: Number of runs at the same time, on this machine.
        trained: Outcome of the run's training together with others; None to train it now.
        claim: The claim on the run, which must be held when the record is written; None if nobody else makes runs of
            this folder.

    Raises:
        ClaimLostError: The claim is another's by now. Nothing is recorded.
        UserError: The run cannot be made as the user asked for it.
        torch.OutOfMemoryError: One of several `jobs` found too little memory. By itself it may have enough, so
            nothing is recorded.
        Exception: The disk is full (`bench.records.leftovers.is_disk_full`). Nothing is recorded.
    """
    state = processes()
    if setting.profile.threads:
        torch.set_num_threads(setting.profile.threads)
    found = find_record(config, setting)
    state.wait_for_everyone()  # a slower process would find the record that a faster one has written meanwhile
    if found:
        remove_unfinished(config, setting)  # there is something if the run was killed after its record
        return found
    require_scoring(MIXTURES[config.mixture].tasks, setting.unsafe_code)
    checkpoint = checkpoint_of(config, setting)
    made_by = provenance.provenance(setting.device, trained.together if trained else jobs)
    if trained:
        made_by = made_by.replace(trained_together=trained.together)
    record = Record(config=config, status="ok", provenance=made_by)
    with temporary_files_removed(setting.results):
        _make(record, setting, checkpoint, trained, jobs)
        if state.is_main_process:
            if claim:
                claim.require()
            records.write(record, setting.results)
            if record.status != "failed":
                remove_unfinished(config, setting)
                remove_failures(config.id, setting.results)
    state.wait_for_everyone()
    if not state.is_main_process:
        written = records.find(config, setting.results)
        assert written is not None, "the first process wrote it"
        record = written
    clear_device_cache(garbage_collection=True)
    return record


def _make(record: Record, setting: RunSettings, checkpoint: Path, trained: Trained | None, jobs: int) -> None:
    """Train and score; a failure becomes the record's status and error, unless it is not one of the run itself."""
    state = processes()
    try:
        names = setting.track if state.is_main_process else ()
        with tracked(names, record.config, setting.results / "tracking") as track:
            _train_and_score(record, setting, checkpoint, track, trained)
    except DivergedError as error:
        record.status, record.error, record.train = "diverged", str(error), _train_section(error.log)
    except UserError:
        raise  # the user's to solve, so not a result of the run
    except torch.OutOfMemoryError as error:
        if jobs > 1:
            remove_unfinished(
                record.config, setting
            )  # its times are those of crowded runs, so nothing may resume from it
            raise
        if state.num_processes > 1:
            raise  # as below
        record.status, record.error = "oom", str(error)
    except Exception as error:
        if state.num_processes > 1:
            raise  # the other processes wait for this one in the middle of a step; the launcher ends them
        if is_disk_full(error):
            raise  # its record would find no space either
        record.status, record.error = "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def checkpoint_of(config: RunConfig, setting: RunSettings) -> Path:
    """Return the file of a run's checkpoint."""
    return setting.results / "checkpoints" / f"{config.id}.pt"


def remove_unfinished(config: RunConfig, setting: RunSettings) -> None:
    """Remove what a run keeps to go on after a kill: its checkpoints and its journal of answers."""
    remove_checkpoints(checkpoint_of(config, setting))
    _journal_path(config, setting).unlink(missing_ok=True)


def unfinished_files(config: RunConfig, setting: RunSettings) -> list[Path]:
    """Return the files from which a run goes on after a kill, whether they exist or not."""
    checkpoint = checkpoint_of(config, setting)
    return [previous_checkpoint(checkpoint), checkpoint, _journal_path(config, setting)]


def _journal_path(config: RunConfig, setting: RunSettings) -> Path:
    return checkpoint_of(config, setting).with_suffix(JOURNAL)


def open_journal(
    config: RunConfig, setting: RunSettings, made_by: Provenance, model: PreTrainedModel | PeftModel
) -> AnswerJournal:
    """Open the journal of a model's answers, next to the run's checkpoint.

    Answers in it count for the same configuration, adapter, code, packages and device only.

    Args:
        config: Configuration of the run.
        setting: Settings that it shares with others.
        made_by: Code, packages and device of this process.
        model: Model that is scored.
    """
    code = made_by.source_sha256, made_by.packages, made_by.device, made_by.cuda
    return AnswerJournal(_journal_path(config, setting), json.dumps([config.hash, hash_adapter(model), *code]))


def _train_and_score(
    record: Record, setting: RunSettings, checkpoint: Path, track: Log, trained: Trained | None
) -> None:
    """Fill in the sections of the record, one after the other.

    So a failure leaves the earlier sections in the record.
    """
    config, profile = record.config, setting.profile
    data = load_data(setting, config.seed)
    is_main = processes().is_main_process
    phase = partial(timed_phase, config.id, is_shown=is_main)
    say = partial(print_line, config.id)
    with phase("loaded the base model"):
        base, tokenizer = load(prepare(setting.model), setting.device)
        require_packing(base)
    model: PreTrainedModel | PeftModel = base
    fresh = None
    record.data = DataSection(sha256=data.sha256, dropped=data.dropped, dropped_validation=data.dropped_validation)
    if config.method != BASE:
        options = {"target_modules": targets(prepare(setting.model)), **config.method_options}
        with phase("added the adapter"):
            model = add_adapter(base, config.method, options, config.seed)
            fresh = extract_experts(model) if malora.has_router(model) else None
        record.parameters = Parameters(**count_parameters(model))
        with phase("tokenized the training data"):
            encoded = encode_training_data(setting, config, tokenizer)
        record.data = record.data.replace(train=label_tokens(data.train, encoded))
        if trained:
            log = trained.restore(model, track)
        else:
            pad_id = tokenizer.pad_token_id or 0
            match_first_batch(model, ALONE, encoded, config, pad_id)
            tokens = sum(len(one.ids) for one in encoded)
            if is_main and setting.device.type == "cpu":
                with phase("measured the speed"):
                    per_token = seconds_per_trained_token(model, [one.ids for one in encoded])
                if per_token is not None:
                    left = time_left(config, data, tokens, per_token, work_of(config, data).steps)
                    say(f"by a short pass: about {left}")
            torch.manual_seed(config.seed + processes().process_index)  # every process drops out other activations
            log = train(
                model,
                encoded,
                config,
                pad_id=pad_id,
                checkpoint=checkpoint,
                checkpoint_every=profile.checkpoint_every,
                track=track,
                first_step=first_step(config, data, tokens, say) if is_main else None,
            )
        record.train = _train_section(log)
        if setting.save and is_main:
            save_adapter(model, prepare(setting.model), setting.save)
    if not is_main:
        return
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # memory of training's CUDA graphs: other runs may share the GPU
    if fresh:
        prompts = {task: [e.prompt for e in items] for task, items in _limited(data.validation, config).items()}
        with phase("analyzed the adapter"):
            inside = analyze_adapter(model, tokenizer, fresh, prompts, setting.peers)
        record.inside = InsideSection(**_rounded(inside))
    start = time.perf_counter()
    journal = open_journal(config, setting, record.provenance, model)
    score_with = score_options(setting) | {"recall": journal.recall}
    if config.method != BASE:
        items = _limited(data.validation, config)
        validation, _, _ = score(model, tokenizer, items, **score_with, progress_of=f"{config.id} validation")
        record.validation = {task: TaskScore(**one) for task, one in validation.items()}
    items = _limited(data.test, config)
    test, record.items, record.gold = score(model, tokenizer, items, **score_with, progress_of=f"{config.id} test")
    record.test = {task: TaskScore(**one) for task, one in test.items()}
    if record.train:
        record.train.seconds["evaluation"] = time.perf_counter() - start + journal.recalled_seconds
    track(_final_scores(record), record.train.steps if record.train else 0)


def _final_scores(record: Record) -> dict[str, float | None]:
    """Return the scores in percent by split and task, for trackers."""
    scores = {"test/mean": record.mean("test"), "validation/mean": record.mean("validation")}
    for split, by_task in (("validation", record.validation), ("test", record.test)):
        scores |= {f"{split}/{task}": 100 * score.value for task, score in (by_task or {}).items()}
    return scores


def score_options(setting: RunSettings) -> dict[str, Any]:
    """Return the options of `score` that the settings choose."""
    profile = setting.profile
    return {
        "format": profile.format,
        "batch_size": profile.eval_batch_size,
        "generation_batch_size": profile.generation_batch_size,
        "unsafe_code": setting.unsafe_code,
        "summed": MIXTURES[setting.mixture_name].compares_summed,
    }


def _train_section(log: TrainLog) -> TrainSection:
    """Return the section `train` of a record."""
    fields = {name: value for name, value in vars(log).items() if name not in ("step_seconds", "captures")}
    fields |= {"curve": _rounded(log.curve), "router": _rounded(log.router)}
    # Fields that older records lack stay unset where they say nothing.
    if log.step_seconds:
        fields["steady_step_seconds"] = _rounded(median(log.step_seconds))
    if log.captures is not None:
        fields["captures"] = log.captures
    return TrainSection(**fields)


def _rounded(value: Any) -> Any:
    """Round all floats to five digits, to keep the record small.

    Floats that JSON does not have become None.
    """
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _limited(examples: dict[str, list[Example]], config: RunConfig) -> dict[str, list[Example]]:
    """Return the first `max_items` items of each task."""
    return {name: items[: config.max_items] for name, items in examples.items()}


_ENCODED: dict[tuple[Any, ...], list[Encoded]] = {}  # of the last run: the next one mostly trains on the same


def encode_training_data(setting: RunSettings, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenize the training examples, or return the last run's if they are the same."""
    seed = blend_seed(setting, config.seed)
    key = (config.model_hash, setting.mixture_name, setting.source, setting.profile.format, seed, config.max_length)
    if key not in _ENCODED:
        _ENCODED.clear()
        _ENCODED[key] = encode(tokenizer, load_data(setting, config.seed).train, config.max_length)
    return _ENCODED[key]


def find_record(config: RunConfig, setting: RunSettings) -> Record | None:
    """Return the run's record, if there is one.

    If the run must save an adapter and the folder does not exist, the record is ignored, so that the run is made again.
    """
    found = records.find(config, setting.results)
    return None if found and found.status == "ok" and setting.save and not setting.save.is_dir() else found
