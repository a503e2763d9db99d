"""One run from its configuration to its record, and many of them side by side."""

from __future__ import annotations

import gc
import hashlib
import math
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

import malora
from bench import UserError
from bench import record as records
from bench.data import Encoded, encode, label_tokens
from bench.inside import look_inside
from bench.model import add_adapter, count_parameters, load, prepare, targets
from bench.profiles import Profile
from bench.record import Record, RunConfig
from bench.score import require_scoring, score
from bench.train import DivergedError, train
from malora.experts import experts
from tasks import MIXTURES, MixtureData, Source, build

BASE = "base"  # the method that trains nothing
PAPER_BETA = {"intra": 1.25, "procedural": 1.25}  # by mixture; elsewhere 1


def processes() -> PartialState:
    """This process among those of `accelerate launch`. While the first one scores, the others wait for hours."""
    return PartialState(timeout=timedelta(hours=12))


@dataclass(frozen=True)
class Setting:
    """What the runs of an experiment have in common, and where their records go."""

    profile: Profile
    model: str
    source: Source
    mixture: str  # the experiment's name for it; the profile may have a stand-in
    results: Path
    method_options: dict[str, Any] = field(default_factory=dict)  # besides those that `method_options` gives
    max_steps: int | None = None
    max_items: int | None = None
    save: Path | None = None  # a folder for the trained adapter
    peers: dict[str, Path] = field(default_factory=dict)  # adapters whose experts are compared with the run's
    unsafe_code: bool = False  # run what a model writes without a sandbox

    @property
    def mixture_name(self) -> str:
        stand_in = self.profile.mixtures.get(self.mixture, self.mixture)
        return stand_in if isinstance(self.source, type(self.profile.source)) else self.mixture

    @property
    def device(self) -> torch.device:
        return processes().device


def configure(setting: Setting, method: str, seed: int, learning_rate: float | None = None) -> RunConfig:
    """The configuration of a run; `learning_rate` None is the paper's."""
    profile = setting.profile
    if method == BASE:
        options, learning_rate, seed = {}, None, 0
    else:
        options = method_options(method, profile, setting.mixture_name, setting.method_options)
        learning_rate = learning_rate or profile.paper_rate
    base = prepare(setting.model)
    data_hash = hashlib.sha256(repr(sorted(_data(setting, seed).sha256.items())).encode()).hexdigest()
    return RunConfig(
        profile=profile.name,
        model=base.name,
        model_hash=base.hash,
        method=method,
        method_options=options,
        mixture=setting.mixture_name,
        format=profile.format,
        data_hash=data_hash,
        seed=seed,
        learning_rate=learning_rate,
        epochs=profile.epochs,
        batch_size=profile.batch_size,
        warmup_ratio=profile.warmup_ratio,
        weight_decay=profile.weight_decay,
        balance_factor=profile.balance_factor,
        max_grad_norm=profile.max_grad_norm,
        max_length=profile.max_length,
        device_type=setting.device.type,
        max_steps=setting.max_steps,
        max_items=setting.max_items,
    )


def method_options(method: str, profile: Profile, mixture: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What differs from the paper's method: ranks for a small model, β for the suite, and then the changes asked for.

    Raises:
        UserError: the method has no such option, or not with such a value.
    """
    config = malora.METHODS[method]()
    divisor, suite = profile.rank_divisor, mixture.partition("/")[0]
    options = {}
    if divisor > 1:
        options |= {"r": config.r // divisor, "lora_alpha": config.lora_alpha // divisor}
        if getattr(config, "d", None):
            options["d"] = config.d // divisor
    if getattr(config, "down", "A_t") != "A_t" and suite in PAPER_BETA:
        options["beta"] = PAPER_BETA[suite]
    options |= changes
    known, general = ({f.name for f in fields(of)} for of in (config, PeftConfig))
    if unknown := ", ".join(sorted(changes.keys() - known)):
        raise UserError(f"{method} has no option {unknown}; there are {', '.join(sorted(known - general))}.")
    try:
        malora.METHODS[method](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{method}: {error}") from error
    return options


def run(config: RunConfig, setting: Setting, jobs: int = 1) -> Record:
    """Make a run, or give back its record if the results folder has it. Failures of a run are recorded, not raised.

    Every process of `accelerate launch` gives back the record that the first one wrote.

    Raises:
        UserError: the run cannot be made as it was asked for.
        torch.OutOfMemoryError: one of several `jobs` found no room, which says nothing of it. There is no record.
    """
    state = processes()
    _limit_threads(setting.profile.threads)
    if found := _recorded(config, setting):
        return found
    require_scoring(MIXTURES[config.mixture].tasks, setting.unsafe_code)
    checkpoint = setting.results / "checkpoints" / f"{config.id}.pt"
    record = Record(config, status="ok", provenance=records.provenance(setting.device, jobs))
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
    _free(setting.device)
    return record


def _free(device: torch.device) -> None:
    """Give back what a run that has ended took of the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _train_and_score(record: Record, setting: Setting, checkpoint: Path) -> None:
    config, profile = record.config, setting.profile
    data = _data(setting, config.seed)
    model, tokenizer = load(prepare(setting.model), setting.device)
    fresh = None
    record.data = {"sha256": data.sha256, "dropped": data.dropped, "dropped_validation": data.dropped_validation}
    if config.method != BASE:
        options = {"target_modules": targets(prepare(setting.model)), **config.method_options}
        model = add_adapter(model, config.method, options, config.seed)
        fresh = experts(model) if malora.has_router(model) else None
        record.parameters = count_parameters(model)
        encoded = _encoded(setting, config, tokenizer)
        record.data["train"] = label_tokens(data.train, encoded)
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
        record.inside = _rounded(look_inside(model, tokenizer, fresh, prompts, setting.peers))
    start = time.perf_counter()
    score_with = score_options(setting)
    if config.method != BASE:
        record.validation, _ = score(model, tokenizer, _limited(data.validation, config), **score_with)
    record.test, record.items = score(model, tokenizer, _limited(data.test, config), **score_with)
    if record.train:
        record.train["seconds"]["evaluation"] = time.perf_counter() - start


def score_options(setting: Setting) -> dict[str, Any]:
    """How the setting has `score` work."""
    profile = setting.profile
    return {
        "format": profile.format,
        "batch_size": profile.eval_batch_size,
        "generation_batch_size": profile.generation_batch_size,
        "unsafe_code": setting.unsafe_code,
    }


def _train_section(log) -> dict:
    return vars(log) | {"curve": _rounded(log.curve), "router": _rounded(log.router)}


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


def _data(setting: Setting, seed: int) -> MixtureData:
    return _build(setting.mixture_name, setting.source, setting.profile.format, _blend_seed(setting, seed))


_ENCODED: dict[tuple, list[Encoded]] = {}  # of the last run, since the next one mostly trains on the same


def _encoded(setting: Setting, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    seed = _blend_seed(setting, config.seed)
    key = (config.model_hash, setting.mixture_name, setting.source, setting.profile.format, seed, config.max_length)
    if key not in _ENCODED:
        _ENCODED.clear()
        _ENCODED[key] = encode(tokenizer, _data(setting, config.seed).train, config.max_length)
    return _ENCODED[key]


def _blend_seed(setting: Setting, seed: int) -> int:
    """The seed of a mixture's draw; one that takes everything is the same for all."""
    return 0 if MIXTURES[setting.mixture_name].blend == "size" else seed


@lru_cache(maxsize=8)
def _build(mixture: str, source: Source, format: str, seed: int) -> MixtureData:
    return build(MIXTURES[mixture], source, format=format, seed=seed)


def _recorded(config: RunConfig, setting: Setting) -> Record | None:
    """The run's record, unless it is to leave an adapter and has not: then the run is made again."""
    found = records.find(config, setting.results)
    return None if found and found.status == "ok" and setting.save and not setting.save.is_dir() else found


def run_all(runs: list[tuple[RunConfig, Setting]], jobs: int) -> Iterator[Record]:
    """Make the runs that the results folder does not have, `jobs` at a time; yields each as it is there.

    What finds no memory beside others is made again when they are done, by itself.
    """
    done = {config.id: found for config, setting in runs if (found := _recorded(config, setting))}
    yield from done.values()
    missing = [(config, setting) for config, setting in runs if config.id not in done]
    if jobs == 1 or len(missing) <= 1:
        for config, setting in missing:
            yield run(config, setting)
        return
    # Processes, each with models and libraries of its own: threads would take turns at the interpreter.
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(min(jobs, len(missing)), context, _start_worker, (number,)) as pool:
        futures = {pool.submit(_run_beside, config, setting, jobs): (config, setting) for config, setting in missing}
        crowded_out = []
        try:
            for future in as_completed(futures):
                if record := future.result():
                    yield record
                else:
                    crowded_out.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for config, setting in crowded_out:
        yield run(config, setting)


def _run_beside(config: RunConfig, setting: Setting, jobs: int) -> Record | None:
    """A run among several at a time; None if it found no memory beside the others."""
    try:
        return run(config, setting, jobs)
    except torch.OutOfMemoryError:
        pass  # it holds the run's tensors until here
    _free(setting.device)
    return None


def _start_worker(number) -> None:
    """Workers take the GPUs in turn."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to their developers


def _limit_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
