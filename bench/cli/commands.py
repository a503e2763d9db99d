"""Commands of `python -m bench`.

They compose the other packages and contain no logic of their own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.cli import own_tasks
from bench.cli.engines import check_engine, count_jobs, opened_engine, pull_records
from bench.cli.estimates import announce, announce_scoring
from bench.cli.tuning import known_sweep, make_floors, make_sweep, run_and_print
from bench.command_line import require_folder
from bench.errors import UserError
from bench.evaluate.score import require_scoring
from bench.experiments.floors import single_task_runs, tasks_at_floor
from bench.experiments.methods import BASE, title_of
from bench.experiments.profiles import PROFILES, Profile
from bench.experiments.registry import Experiment, open_data_mixture, tuning_groups_of
from bench.models.adapters import check_adapter
from bench.models.base import prepare
from bench.records import provenance, schema, speed_schema, store
from bench.records.files import stale_files, write_atomically
from bench.records.leftovers import remove_temporary_files
from bench.records.schema import TaskScore
from bench.report import readme
from bench.report.claims import claims
from bench.report.model_card import model_card
from bench.report.scores.experiment_page import experiment_page
from bench.report.scores.selection import records_frame, records_that_lend_rates, select, tuned_rates
from bench.report.speed import tables
from bench.runs.elsewhere import elsewhere_config, score_elsewhere
from bench.runs.plan import plan_runs, rates_before_sweep
from bench.runs.run import remove_unfinished, run
from bench.runs.setting import RunSettings, make_run_config
from bench.runs.sweep import expected_sweep
from bench.runtime.processes import processes
from bench.train.tracking import require_trackers
from tasks import MIXTURES, Folder

LOCAL = store.RESULTS / "local"
TRIALS = "trials"  # folder of runs that were cut short, by profile
SPEED = "speed"  # folder of the records of bench.speed, next to those of the profiles


def make_setting_from(options: argparse.Namespace, mixture: str | None) -> RunSettings:
    """Make the settings that the options ask for.

    Args:
        options: Parsed options of a command that trains or scores.
        mixture: Mixture to train or score on: a name, or the file of a description. None for the tasks of `--task`.

    Raises:
        UserError: The options contradict each other, `--data` is not a folder, or a tracker is not installed.
    """
    require_trackers(getattr(options, "track", ()))
    profile: Profile = PROFILES[options.profile]
    mixture = own_tasks.resolve(options, mixture, profile)
    if options.data and profile.name == "tiny" and not options.model:
        raise UserError("the tiny base model knows the words of generated tasks only; with --data use --profile small.")
    setting = RunSettings(
        profile=profile,
        model=options.model or profile.model,
        source=Folder(options.data) if options.data else profile.source,
        mixture=mixture,
        results=options.results or LOCAL / profile.name,
        method_options=dict(getattr(options, "set", [])),
        max_steps=options.max_steps,
        max_items=options.max_items,
        save=getattr(options, "save", None),
        track=getattr(options, "track", ()),
        unsafe_code=options.unsafe_code,
    )
    profile = profile.on(setting.mixture_name)
    changes = {"format": options.format}
    changes |= {name: getattr(options, name, None) for name in ("epochs", "warmup_ratio")}
    return replace(setting, profile=replace(profile, **{k: v for k, v in changes.items() if v is not None}))


def make_table(options: argparse.Namespace) -> int:
    """Make the runs of an experiment, then write and print its page.

    Returns:
        1 if a run failed, else 0.
    """
    experiment: Experiment = options.experiment
    setting = make_setting_from(options, open_data_mixture(experiment.mixture) if options.data else experiment.mixture)
    check_engine(options, setting)
    pull_records(options, setting)
    published = store.read_all(store.RESULTS / setting.profile.name)
    mine = store.read_all(setting.results)  # before the runs, so that a broken record is found early
    like = make_run_config(setting, BASE, 0)
    if options.floors:
        _require_no_table_options(options)
        return make_floors(setting, experiment.name, options, [*published, *mine])
    entries = experiment.chosen(options.methods)
    tuning_groups = tuning_groups_of(entries)
    at_floor = tasks_at_floor([*published, *mine], like)
    sweeps = options.sweep or options.only_sweep
    known = known_sweep(setting, tuning_groups, at_floor) if sweeps else []
    swept = [(one.config, setting) for one in known]
    if sweeps:
        to_come = expected_sweep(setting, tuning_groups, known, at_floor)
        swept += to_come
        rates = tuned_rates(experiment, records_frame([*known, *single_task_runs([*published, *mine], like)]))
        expected = rates_before_sweep(setting, tuning_groups) if to_come else rates.tuned
    else:
        # Learning rates are tuned for a model's name, because its weights may differ by rounding between machines.
        rates = tuned_rates(experiment, records_that_lend_rates(records_frame(published), like))
        if not rates.tuned:
            rates = tuned_rates(experiment, records_that_lend_rates(records_frame(mine), like))
        expected = rates.tuned
    batches = [] if options.only_sweep else plan_runs(setting, experiment, entries, options.seeds, expected)
    planned = [run for batch in batches for run in batch]
    announce_all = partial(
        announce, experiment.name, [*swept, *planned], [*published, *_published_trials(setting), *mine]
    )
    if options.dry_run:
        if processes().is_main_process:
            announce_all(count_jobs(options, setting), dry_run=True)
        return 0
    _open_results(setting.results)
    with opened_engine(options, setting) as engine:
        if processes().is_main_process:
            announce_all(engine.at_a_time, dry_run=False)
        if sweeps:
            made = make_sweep(engine, setting, tuning_groups, at_floor)
            rates = tuned_rates(experiment, records_frame([*made, *single_task_runs([*published, *mine], like)]))
        if options.only_sweep:
            if processes().is_main_process:
                print("\n".join(f"{title_of(method)}: {rate:g}" for method, rate in rates.tuned.items()))
            return int(any(r.status == "failed" for r in made))
        if (without := [m for m in tuning_groups if m not in rates.tuned]) and processes().is_main_process:
            message = "no tuned learning rate, so the paper's is used; --sweep tunes."
            print(f"{', '.join(without)}: {message}", file=sys.stderr)
        runs = []
        for batch in plan_runs(setting, experiment, entries, options.seeds, rates.tuned):
            runs += run_and_print(engine, batch, experiment.name)
    if processes().is_main_process:
        frame = records_frame(store.read_all(setting.results))
        selection = select(experiment, setting.profile.name, frame, like=like, rates=rates)
        text = experiment_page(selection, swept=sweeps, published=records_frame(published))
        page = setting.results / f"{experiment.name}.md"
        write_atomically(page, text)
        print(f"\n{text}\nwritten to {page}")
    return int(any(r.status == "failed" for r in runs))


def _require_no_table_options(options: argparse.Namespace) -> None:
    """Check that no option would be ignored because `--floors` makes no table."""
    for name in ("methods", "seeds", "sweep", "only_sweep"):
        if getattr(options, name):
            raise UserError(f"--floors makes no table; leave out --{name.replace('_', '-')}.")


def _open_results(folder: Path) -> None:
    """Create a folder of results, or remove what killed processes have left half-written in it."""
    store.open_folder(folder)
    if processes().is_main_process:
        remove_temporary_files(folder)


def make_run(options: argparse.Namespace) -> int:
    """Make one run and print its scores.

    Returns:
        1 if the run failed, else 0.
    """
    setting = make_setting_from(options, options.mixture)
    config = make_run_config(setting, options.method, options.seed, options.learning_rate)
    if setting.save:
        require_folder("--save", setting.save)
    if setting.save and store.find(config, setting.results):
        raise UserError(
            f"{config.id} is already recorded in {setting.results}, and an adapter can be saved only by the run that "
            "trains it; give another folder as --results to make the run again."
        )
    if not options.dry_run:
        _open_results(setting.results)
    if processes().is_main_process:
        announce("run", [(config, setting)], _records_of(setting), 1, dry_run=options.dry_run)
    if options.dry_run:
        return 0
    one = run(config, setting)
    if one.status == "failed":
        print(one.error, file=sys.stderr)
        return 1
    if processes().is_main_process:
        if setting.save and one.status == "ok":
            write_atomically(setting.save / "README.md", model_card(one, prepare(setting.model).commit))
        _print_scores(one.test or {})
        print(f"{one.status}; recorded in {one.path}")
    return 0


def _records_of(setting: RunSettings) -> list[schema.Record]:
    """Return the published records of the profile, also of runs cut short, and those of the results folder."""
    published = store.read_all(store.RESULTS / setting.profile.name)
    return [*published, *_published_trials(setting), *store.read_all(setting.results)]


def _published_trials(setting: RunSettings) -> list[schema.Record]:
    return store.read_all(store.RESULTS / TRIALS / setting.profile.name)


def score_adapter(options: argparse.Namespace) -> int:
    """Score a saved adapter and print its scores; with `--record`, record them.

    Of several processes only the first one scores.
    """
    setting = make_setting_from(options, options.mixture)
    if not processes().is_main_process:
        return 0
    check_adapter(options.adapter)
    require_scoring(MIXTURES[setting.mixture_name].tasks, options.unsafe_code)
    if options.record:
        _open_results(setting.results)
    config = elsewhere_config(setting, options.adapter)
    one = store.find(config, setting.results) if options.record else None
    if one is None:
        announce_scoring(config, setting, _records_of(setting))
        one = score_elsewhere(config, setting, options.adapter, keep=options.record)
    _print_scores(one.test or {})
    if options.record:
        print(f"recorded in {one.path or store.write(one, setting.results)}")
        remove_unfinished(config, setting)
    return 0


def _print_scores(scores: Mapping[str, TaskScore]) -> None:
    """Print a line per task.

    A line has percent, half the width of the 95% interval, metric and number of items.
    """
    for task, result in scores.items():
        half = f" ± {196 * result.stderr:.1f}" if result.stderr is not None else ""
        print(f"{task:16} {100 * result.value:5.1f}{half}  ({result.metric}, {result.n} items)")


def write_leaderboards(options: argparse.Namespace) -> int:
    """Write all pages in results/ and the README's tables.

    With `--check`, only compare them.

    Returns:
        1 if `--check` finds a page that does not agree with the records, else 0.
    """
    records = {name: store.read_all(store.RESULTS / name) for name in PROFILES}
    records = {name: found for name, found in records.items() if found}
    speeds = store.read_speed(store.RESULTS / SPEED)
    tested = claims(records, speeds)
    pages = {store.RESULTS / name: text for name, text in readme.published_pages(records, tested).items()}
    pages |= {store.RESULTS / SPEED / name: text for name, text in tables.pages(speeds).items()}
    front = provenance.ROOT / "README.md"
    pages[front] = readme.fill_readme(readme.read_readme(front), records, speeds, tested)
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_bytes() != text.encode()]
    if not options.check:
        for interrupted in {found for page in pages for found in stale_files(page.parent)}:
            interrupted.unlink(missing_ok=True)
    for path in stale:
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, pages[path])
        print(
            f"{'does not agree with the records' if options.check else 'written'}: {path.relative_to(provenance.ROOT)}"
        )
    return int(options.check and bool(stale))


def write_report(options: argparse.Namespace) -> int:
    """Write the HTML report on all published records."""
    try:
        from bench.report.html import page  # it is slow to import, and needs an extra
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install --editable '.[bench]'.") from error
    path: Path = options.output or LOCAL / "report.html"
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file, such as {path / 'report.html'}.")
    records = {name: store.read_all(store.RESULTS / name) for name in PROFILES}
    speeds = store.read_speed(store.RESULTS / SPEED)
    text = page(records, speeds, claims(records, speeds))
    path.parent.mkdir(parents=True, exist_ok=True)
    for interrupted in stale_files(path.parent):
        interrupted.unlink(missing_ok=True)
    write_atomically(path, text)
    print(f"written to {path}")
    return 0


def publish_records(options: argparse.Namespace) -> int:
    """Copy records that may be published to results/.

    Print the reason for each record that may not be published.
    """
    if options.trials and options.profile == SPEED:
        raise UserError("--trials is for runs of a profile; measurements of speed have no estimates that use them.")
    source = options.results or LOCAL / options.profile
    published = (store.RESULTS / TRIALS if options.trials else store.RESULTS) / options.profile
    if not (source / "runs").is_dir():
        raise UserError(f"{source} has no records, because it has no folder runs; name another folder as --results.")
    records: Sequence[schema.Record | speed_schema.SpeedRecord]
    records = store.read_speed(source) if options.profile == SPEED else store.read_all(source)
    remove_temporary_files(published)
    paths, refused = store.publish(records, published, cut_short=options.trials)
    for reason in refused:
        print(f"not published: {reason}", file=sys.stderr)
    use = "estimates use them" if options.trials else "`python -m bench leaderboard` writes the tables from them"
    print(f"{len(paths)} new records in {published}; {use}.")
    return 0
