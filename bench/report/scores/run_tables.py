"""Tables of single runs, to Markdown: what each rate gave, what the routers did, what an option changed. Pure."""

from __future__ import annotations

import json

from tabulate import tabulate

from bench.experiments.methods import TITLES
from bench.experiments.registry import SWEEP_SEED, Experiment, TableEntry
from bench.records.schema import Record
from bench.report.scores.selection import entries_of
from bench.report.stats import Spread, compare, compare_apart


def sweep_table(experiment: Experiment, records: list[Record], tuned: dict[str, float]) -> str:
    """Validation means of the sweep's seed, by method and rate."""
    runs = {
        (r.config.method, r.config.learning_rate): r
        for r in records
        if r.config.seed == SWEEP_SEED and experiment.has(TableEntry(r.config.method), r.config)
    }
    rates = sorted({rate for _, rate in runs if rate is not None})
    body = []
    for method in dict.fromkeys(entry.tuning_group for entry in entries_of(experiment, records)):
        cells = []
        for rate in rates:
            record = runs.get((method, rate))
            if record is None:
                cells.append("not run")
            elif record.status != "ok":
                steps = f" by step {record.train.steps}" if record.train else ""
                cells.append(f"{record.status}{steps}")
            else:
                cell = f"{record.mean('validation'):.1f}"
                cells.append(f"**{cell}**" if rate == tuned.get(method) else cell)
        if set(cells) != {"not run"}:
            body.append([TITLES.get(method, method), *cells])
    head = ["method", *(f"{rate:g}" for rate in rates)]
    table = tabulate(body, head, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * len(rates)))
    note = f"Mean over the validation sets, seed {SWEEP_SEED}. Bold: chosen."
    if any("not run" in row for row in body):
        note += " **This sweep is not complete**: a method's own rate is the best of those that were run."
    return f"{table}\n\n{note}"


def router_table(experiment: Experiment, records: list[Record]) -> str:
    """How decided the routers were at the end of each run of the sweep's seed, and how far gradients had grown."""
    body = []
    for r in sorted(records, key=lambda r: (r.config.method, r.config.learning_rate or 0)):
        if r.config.seed == SWEEP_SEED and r.train and r.train.router:
            first, last = r.train.router[0], r.train.router[-1]
            norms = [point.grad_norm for point in r.train.curve if point.grad_norm is not None]
            body.append(
                [
                    TITLES.get(r.config.method, r.config.method),
                    f"{r.config.learning_rate:g}",
                    r.status,
                    f"{show(first.gate_sum)} → {show(last.gate_sum)}",
                    f"{show(first.entropy)} → {show(last.entropy)}",
                    show(last.largest_share),
                    last.unused_experts,
                    show(max(norms, default=None)),
                    show(norms[-1] if norms else None),
                ]
            )
    if not body:
        return ""
    head = [
        "method",
        "rate",
        "status",
        "gate sum",
        "entropy",
        "largest share",
        "unused experts",
        "largest gradient",
        "last gradient",
    ]
    table = tabulate(body, head, tablefmt="pipe", disable_numparse=True)
    return (
        f"{table}\n\nFrom the first to the last reading, means over layers: the gate sum is what the top k's update is "
        "scaled by, since gates are not renormalised (k/N for a router that does not choose, 1 for one that is "
        "certain); entropy in nats; the largest expert's share of the assignments; experts without a token in the last "
        "batch read, over all layers; gradient norms before clipping, means of ten steps."
    )


def options_table(records: list[Record], mine: list[Record], runs_vary: Spread | None) -> str:
    """Runs with other options of a method than the page's, each beside its twin without them."""
    body = []
    for record in sorted((r for r in records if r not in mine and r.test), key=lambda r: r.config.id):
        alike = record.config.config_key_without("method_options", "data_hash")
        twin = next(
            (r for r in mine if r.test and r.config.config_key_without("method_options", "data_hash") == alike), None
        )
        if twin is None or record.data.sha256["test"] != twin.data.sha256["test"]:
            continue
        usual = twin.config.method_options
        set_to = {k: v for k, v in record.config.method_options.items() if v != usual.get(k)}
        if not set_to:
            continue
        sides = [twin.items], [record.items]
        d = compare_apart(*sides, runs_vary) if runs_vary else compare(*sides)
        body.append([
            TITLES.get(record.config.method, record.config.method), f"{record.config.learning_rate:g}",
            record.config.seed, ", ".join(f"`{k}={json.dumps(v)}`" for k, v in set_to.items()),
            f"{twin.mean():.1f}", f"{record.mean():.1f}", f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p={d.p:.2g}",
        ])  # fmt: skip
    if not body:
        return ""
    head = ["method", "rate", "seed", "set", "mean without", "mean with", "difference"]
    table = tabulate(body, head, tablefmt="pipe", disable_numparse=True)
    known = "is taken from the methods with several seeds" if runs_vary else "one seed does not know"
    return f"{table}\n\nPaired over items; how much a run varies {known}."


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
