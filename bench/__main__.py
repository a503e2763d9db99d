"""The command line; composition only.

python -m bench table2                       # the paper's Table 2 at the size that this machine can do
python -m bench run --method malora          # one run
python -m bench leaderboard                  # tables from records
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import malora
from bench import UserError, goals, record, report, speed_report
from bench.arguments import Help, folder, one_of, positive
from bench.claims import claims
from bench.experiments import EXPERIMENTS, Runs, families_of, final, opened, sweep
from bench.model import check_adapter, load, load_adapter, prepare
from bench.profiles import PROFILES, Profile, default_profile
from bench.rows import tuned_rates
from bench.run import BASE, Setting, configure, processes, run, run_all, score_options
from bench.score import require_scoring, score
from tasks import FORMATS, MIXTURES, DataError, Folder, build

LOCAL = record.RESULTS / "local"
SPEED = "speed"  # the folder of bench.speed's records, beside those of the profiles


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to their developers
    try:
        return options.command(options) or 0
    except (UserError, DataError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, experiment in EXPERIMENTS.items():
        table = commands.add_parser(name, help=f"{experiment.title}: train, score, lay out", formatter_class=Help)
        _add_setting(table)
        table.add_argument(
            "--methods",
            type=_methods,
            metavar="A,B",
            help=f"rows of these methods, by commas (default: all, of {', '.join(experiment.methods)})",
        )
        table.add_argument(
            "--seeds", type=positive, metavar="K", help="runs a row (default: the profile's, or the row's)"
        )
        table.add_argument(
            "--sweep",
            action="store_true",
            help="first try each of the profile's rates for each method; without it the published choice counts",
        )
        table.add_argument(
            "--jobs", type=positive, metavar="J", help="runs at a time (default: one a core, or one on a GPU)"
        )
        table.set_defaults(command=_table, experiment=experiment)

    one = commands.add_parser("run", help="one run: train, score, record", formatter_class=Help)
    _add_setting(one)
    one.add_argument("--method", type=_method, default="malora", metavar="M", help="what to train")
    one.add_argument(
        "--mixture",
        type=one_of("mixture", MIXTURES),
        default="intra",
        metavar="NAME",
        help="tasks to train together, or one part of them alone, as in inter/code; the tiny profile has stand-ins",
    )
    one.add_argument("--seed", type=int, default=0, metavar="S", help="of initialisation, order and dropout")
    one.add_argument("--learning-rate", type=_rate, metavar="R", help="(default: the paper's)")
    one.add_argument(
        "--set",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method's config, its value in JSON: beta=2, backend=dispatch, 'freeze=[\"router\"]'",
    )
    one.add_argument("--save", type=Path, metavar="DIR", help="keep the trained adapter there")
    one.set_defaults(command=_run)

    scored = commands.add_parser("score", help="score a saved adapter on a mixture's tests", formatter_class=Help)
    _add_setting(scored)
    scored.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="what save_pretrained wrote")
    scored.add_argument(
        "--mixture", type=one_of("mixture", MIXTURES), default="intra", metavar="NAME", help="whose tests"
    )
    scored.set_defaults(command=_score)

    board = commands.add_parser(
        "leaderboard", help="write results/**/*.md and the README's table from records", formatter_class=Help
    )
    board.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file is not what the records give"
    )
    board.set_defaults(command=_leaderboard)

    page = commands.add_parser("report", help="one HTML page of all published records, into results/local")
    page.set_defaults(command=_report)

    publish = commands.add_parser("publish", help="copy clean, whole records to results/PROFILE", formatter_class=Help)
    publish.add_argument(
        "--profile",
        type=one_of("profile", (*PROFILES, SPEED)),
        default=default_profile(),
        metavar="P",
        help=f"whose; {SPEED} for those of bench.speed",
    )
    publish.add_argument("--results", type=folder, metavar="DIR", help="where from (default: results/local/PROFILE)")
    publish.set_defaults(command=_publish)
    return parser


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=one_of("profile", PROFILES),
        default=default_profile(),
        metavar="P",
        help=f"size of the experiment: {', '.join(PROFILES)}",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of *.jsonl.gz (default: the profile's: generated for tiny, else the Hugging Face hub)",
    )
    parser.add_argument("--model", metavar="M", help="built-in name, folder or hub id (default: the profile's)")
    parser.add_argument(
        "--format",
        type=one_of("format", FORMATS),
        metavar="F",
        help=f"how questions are put: {', '.join(FORMATS)} (default: the profile's)",
    )
    parser.add_argument("--results", type=folder, metavar="DIR", help="for records (default: results/local/PROFILE)")
    parser.add_argument("--max-steps", type=positive, metavar="N", help="stop training early, to try things out")
    parser.add_argument("--max-items", type=positive, metavar="N", help="score so many items a task, to try things out")
    parser.add_argument(
        "--unsafe-code", action="store_true", help="run what models write (HumanEval) on purpose without a sandbox"
    )


_method = one_of("method", malora.METHODS)


def _methods(value: str) -> list[str]:
    return [_method(name) for name in value.split(",")]


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} must be a number above 0")
    return rate


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word is a string


def _setting(options: argparse.Namespace, mixture: str) -> Setting:
    profile: Profile = PROFILES[options.profile]
    if options.data and profile.name == "tiny" and not options.model:
        raise UserError("the tiny base knows the words of the procedural tasks only; with --data take --profile small.")
    setting = Setting(
        profile=profile,
        model=options.model or profile.model,
        source=Folder(options.data) if options.data else profile.source,
        mixture=mixture,
        results=options.results or LOCAL / profile.name,
        method_options=dict(getattr(options, "set", [])),
        max_steps=options.max_steps,
        max_items=options.max_items,
        save=getattr(options, "save", None),
        unsafe_code=options.unsafe_code,
    )
    profile = profile.on(setting.mixture_name)
    return replace(setting, profile=replace(profile, format=options.format or profile.format))


def _table(options: argparse.Namespace) -> int:
    experiment = options.experiment
    setting = _setting(options, opened(experiment.mixture) if options.data else experiment.mixture)
    published = record.read_all(record.RESULTS / setting.profile.name)
    mine = record.read_all(setting.results)  # a broken record is better found before the runs than after
    alone = processes().num_processes == 1
    jobs = (options.jobs or (_cores() if setting.device.type == "cpu" else 1)) if alone else 1
    like = configure(setting, BASE, 0)
    entries = experiment.chosen(options.methods)
    families = families_of(entries)
    record.open_folder(setting.results)
    if options.sweep:
        known = _run_and_print(sweep(setting, families), jobs, "sweep")
    else:
        # Rates are tuned for a model by name: its weights may differ by rounding where they were made.
        known = _tuned_alike(published or mine, like)
    tuned, lender = tuned_rates(experiment, known)
    if (without := [m for m in families if m not in tuned]) and processes().is_main_process:
        print(f"no rate is tuned for {', '.join(without)}: the paper's only; --sweep tunes.", file=sys.stderr)
    runs = []
    for wave in final(setting, experiment, entries, options.seeds, tuned):
        runs += _run_and_print(wave, jobs, experiment.name)
    if processes().is_main_process:
        page = setting.results / f"{experiment.name}.md"
        page.write_text(
            report.experiment_page(
                experiment,
                record.read_all(setting.results),
                setting.profile.name,
                tuned,
                like=like,
                swept=options.sweep,
                published=published,
                lender=lender,
            )
        )
        print(f"\n{page.read_text()}\nwritten to {page}")
    return int(any(r.status == "failed" for r in runs))


def _tuned_alike(records: list[record.Record], like: record.RunConfig) -> list[record.Record]:
    """Those whose rates may count for runs like this one.

    Where tasks were never asked in the format of domains, they lend the rates that they were tuned to in another.
    """
    free = ("model_hash", "method", "method_options", "mixture", "learning_rate", "seed", "data_hash", "max_steps",
            "max_items", "epochs", "batch_size", "format")  # fmt: skip
    alike = [r for r in records if r.config.but(*free) == like.but(*free)]
    known = [r for r in alike if r.config.format == like.format]
    if MIXTURES[like.mixture].domains and all(MIXTURES[r.config.mixture].domains for r in known):
        known += [r for r in alike if not MIXTURES[r.config.mixture].domains]
    return known


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_and_print(runs: Runs, jobs: int, what: str) -> list[record.Record]:
    records = []
    for number, one in enumerate(run_all(runs, jobs), 1):
        records.append(one)
        if not processes().is_main_process:
            continue
        result = (
            f"mean {one.mean():.1f}" if one.status == "ok" else f"{one.status}: {(one.error or '').splitlines()[0]}"
        )
        print(f"{what} {number}/{len(runs)} {one.config.id}: {result}", file=sys.stderr, flush=True)
    return records


def _run(options: argparse.Namespace) -> int:
    setting = _setting(options, options.mixture)
    config = configure(setting, options.method, options.seed, options.learning_rate)
    if setting.save and setting.save.is_file():
        raise UserError(f"--save {setting.save} is a file; give a folder for the adapter.")
    if setting.save and record.find(config, setting.results):
        raise UserError(
            f"{config.id} is recorded in {setting.results}, and an adapter is kept only while its run is made; "
            "give another folder as --results to make it again."
        )
    record.open_folder(setting.results)
    one = run(config, setting)
    if one.status == "failed":
        print(one.error, file=sys.stderr)
        return 1
    if processes().is_main_process:
        _print_scores(one.test or {})
        print(f"{one.status}; recorded in {one.path}")
    return 0


def _score(options: argparse.Namespace) -> int:
    setting = _setting(options, options.mixture)
    check_adapter(options.adapter)
    require_scoring(MIXTURES[setting.mixture_name].tasks, options.unsafe_code)
    model, tokenizer = load(prepare(setting.model), setting.device)
    model = load_adapter(model, options.adapter)
    data = build(MIXTURES[setting.mixture_name], setting.source, format=setting.profile.format, seed=0)
    tests = {task: items[: setting.max_items] for task, items in data.test.items()}
    results, _ = score(model, tokenizer, tests, **score_options(setting))
    _print_scores(results)
    return 0


def _print_scores(scores: dict[str, dict]) -> None:
    for task, result in scores.items():
        half = f" ± {196 * result['stderr']:.1f}" if result["stderr"] is not None else ""
        print(f"{task:16} {100 * result['value']:5.1f}{half}  ({result['metric']}, {result['n']} items)")


def _leaderboard(options: argparse.Namespace) -> int:
    records = {name: record.read_all(record.RESULTS / name) for name in PROFILES}
    records = {name: found for name, found in records.items() if found}
    pages = {record.RESULTS / name: text for name, text in report.published_pages(records).items()}
    speeds = record.read_speed(record.RESULTS / SPEED)
    pages |= {record.RESULTS / SPEED / name: text for name, text in speed_report.pages(speeds).items()}
    readme = record.ROOT / "README.md"
    pages[readme] = goals.fill_readme(report.fill_readme(readme.read_text(), records, speeds), speeds)
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if not options.check:
            path.write_text(pages[path])
        print(f"{'not what the records give' if options.check else 'written'}: {path.relative_to(record.ROOT)}")
    return int(options.check and bool(stale))


def _report(options: argparse.Namespace) -> int:
    try:
        from bench.page import page  # what it needs is an extra, and slow to import
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install 'malora[report]'.") from error
    records = {name: record.read_all(record.RESULTS / name) for name in PROFILES}
    speeds = record.read_speed(record.RESULTS / SPEED)
    path = LOCAL / "report.html"
    text = page(records, speeds, claims(records, speeds))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written to {path}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    source, published = options.results or LOCAL / options.profile, record.RESULTS / options.profile
    if not (source / "runs").is_dir():
        raise UserError(f"there are no records in {source}: it has no folder runs; --results says where they are.")
    read = record.read_speed if options.profile == SPEED else record.read_all
    paths, refused = record.publish(read(source), published)
    for reason in refused:
        print(f"not published: {reason}", file=sys.stderr)
    print(f"{len(paths)} new records in {published}; `python -m bench leaderboard` writes its tables.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
