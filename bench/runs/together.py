"""Make several runs of one base model and mixture at once: they train together and are scored one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedTokenizerBase

from bench.errors import UserError
from bench.experiments.methods import BASE
from bench.models.base import load, prepare, targets
from bench.models.joint import Member, can_join, join_adapters
from bench.records.schema import Record, RunConfig
from bench.runs.plan import Runs
from bench.runs.run import checkpoint_of, encode_training_data, run
from bench.runs.setting import RunSettings
from bench.runtime.attention import require_packing
from bench.runtime.processes import processes
from bench.train.together import JointRun, Trained, train_together

# In these fields runs that train together may differ.
_OWN_FIELDS = ("method", "method_options", "seed", "learning_rate", "data_hash")


def run_together(runs: Runs, most: int) -> Iterator[Record]:
    """Make runs, of which up to `most` train together, and yield their records.

    Runs that fit no other run are made alone: the base model, DoRA, and adapters in float8. Runs that find too little
    memory together are divided into halves. If training together fails, each run is made alone, so that the failure is
    in the record of the run that causes it.

    Args:
        runs: Configurations with their settings, none of which has a record.
        most: Maximum number of runs that train together.
    """
    assert processes().num_processes == 1, "the command line has checked this"
    for group in group_runs(runs, most):
        yield from _run_group(group)


def group_runs(runs: Runs, most: int) -> list[Runs]:
    """Divide runs into groups that can train together, in the order of their first runs."""
    groups: dict[object, list[Runs]] = {}
    ordered: list[Runs] = []
    for config, setting in runs:
        key = (config.config_key_without(*_OWN_FIELDS), setting.model, setting.source, setting.profile.name)
        fitting = groups.setdefault(key, [])
        options = config.method_options
        joins = config.method != BASE and can_join(config.method, options)
        if joins and fitting and len(fitting[-1]) < most:
            fitting[-1].append((config, setting))
            continue
        ordered.append([(config, setting)])
        if joins:
            fitting.append(ordered[-1])
    return ordered


def _run_group(group: Runs) -> Iterator[Record]:
    """Train the runs of a group together, or in smaller groups if that fails, and score them."""
    trained: dict[str, Trained] = {}
    largest = len(group)  # runs that may train together
    if len(group) > 1:
        try:
            trained = _train(group)
        except torch.OutOfMemoryError:  # the exception keeps the tensors alive until here
            largest = (len(group) + 1) // 2
            print(f"{len(group)} runs together find too little memory; {largest} at a time.", file=sys.stderr)
        except UserError:
            raise
        except Exception as error:  # of one of the runs, whose record will say so
            largest = 1
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{len(group)} runs cannot train together ({reason}); they are made one by one.", file=sys.stderr)
        clear_device_cache(garbage_collection=True)
    if largest < len(group):
        for first in range(0, len(group), largest):
            yield from _run_group(group[first : first + largest])
        return
    for config, setting in group:
        yield run(config, setting, trained=trained.get(config.id))


def _train(group: Runs) -> dict[str, Trained]:
    """Train the runs of a group; returns the outcomes by the id of the run.

    Raises:
        UserError: The base model cannot be trained here, or a method does not fit it.
        torch.OutOfMemoryError: They need more memory than there is.
    """
    _, setting = group[0]
    if setting.profile.threads:
        torch.set_num_threads(setting.profile.threads)
    prepared = prepare(setting.model)
    base, tokenizer = load(prepared, setting.device)
    require_packing(base)
    names = {config.id: f"run{number}" for number, (config, _) in enumerate(group)}
    members = [
        Member(names[c.id], c.method, {"target_modules": targets(prepared), **c.method_options}, c.seed)
        for c, _ in group
    ]
    model = join_adapters(base, members)
    joint = [_joint_run(config, own, names[config.id], tokenizer) for config, own in group]
    outcomes = train_together(
        model, joint, pad_id=tokenizer.pad_token_id or 0, checkpoint_every=setting.profile.checkpoint_every
    )
    return {id: outcomes[name] for id, name in names.items()}


def _joint_run(config: RunConfig, setting: RunSettings, name: str, tokenizer: PreTrainedTokenizerBase) -> JointRun:
    encoded = encode_training_data(setting, config, tokenizer)
    return JointRun(config, name, encoded, checkpoint_of(config, setting))
