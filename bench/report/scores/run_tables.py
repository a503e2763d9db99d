"""Tables of single runs.

They are of sweeps of the learning rate, router statistics, and effects of single options.
"""

from __future__ import annotations

import json

from bench.experiments.methods import title_of
from bench.experiments.registry import SWEEP_SEED, TableEntry, tuning_groups_of
from bench.records.schema import Record
from bench.report.markdown import number, table
from bench.report.scores.selection import Selection, records_of, runs_of
from bench.report.stats import Spread, compare, compare_apart


def sweep_table(selection: Selection) -> str:
    """Return the validation means of the sweep's seed, by method and learning rate."""
    frame = selection.frame
    sweep = frame[(frame["seed"] == SWEEP_SEED) & frame["learning_rate"].notna()]
    of_method = {
        method: runs_of(sweep, selection.experiment, TableEntry(method))
        .drop_duplicates("learning_rate", keep="last")
        .set_index("learning_rate")["record"]
        for method in tuning_groups_of(selection.entries)
    }
    rates = sorted({rate for runs in of_method.values() for rate in runs.index})
    body = []
    for method, runs in of_method.items():
        if len(runs):
            chosen = selection.rates.tuned.get(method)
            cells = [_sweep_cell(runs[rate], rate == chosen) if rate in runs else "not run" for rate in rates]
            body.append([title_of(method), *cells])
    head = ["method", *(f"{rate:g}" for rate in rates)]
    note = f"Mean over the validation sets, seed {SWEEP_SEED}. Bold: chosen."
    if any("not run" in row for row in body):
        note += " **This sweep is not complete**: a method's own rate is the best of those that were run."
    return f"{table(body, head, ['left', *['right'] * len(rates)])}\n\n{note}"


def _sweep_cell(record: Record, is_chosen: bool) -> str:
    if record.status != "ok":
        return record.status + (f" by step {record.train.steps}" if record.train else "")
    mean = f"{record.mean('validation'):.1f}"
    return f"**{mean}**" if is_chosen else mean


def router_table(selection: Selection) -> str:
    """Return router statistics and gradient norms of the runs of the sweep's seed.

    Returns "" without any.
    """
    frame = selection.frame.sort_values(["method", "learning_rate"], kind="stable")
    body = []
    for r in records_of(frame[frame["seed"] == SWEEP_SEED]):
        if r.train and r.train.router:
            first, last = r.train.router[0], r.train.router[-1]
            norms = [point.grad_norm for point in r.train.curve if point.grad_norm is not None]
            body.append([
                title_of(r.config.method), f"{r.config.learning_rate:g}", r.status,
                f"{number(first.gate_sum)} → {number(last.gate_sum)}",
                f"{number(first.entropy)} → {number(last.entropy)}",
                number(last.largest_share), last.unused_experts,
                number(max(norms, default=None)), number(norms[-1] if norms else None),
            ])  # fmt: skip
    if not body:
        return ""
    head = ["method", "rate", "status", "gate sum", "entropy", "largest share", "unused experts", "largest gradient",
            "last gradient"]  # fmt: skip
    return (
        f"{table(body, head)}\n\nFrom the first to the last reading, means over layers. The gate sum scales the update "
        "of the top k experts, because gates are not renormalised: k/N for uniform gates, 1 for a router that is "
        "certain. The entropy is in nats. The largest share is that of the assignments of the most used expert. Unused "
        "experts had no token in the last batch that was read, over all layers. Gradient norms are before clipping, "
        "means over ten steps."
    )


def options_table(selection: Selection, between_seeds: Spread | None) -> str:
    """Compare runs that have another option of a method with their twins without it.

    Returns "" without any.
    """
    mine = [record for record in selection.records if record.test]
    others = selection.folder[~selection.folder.index.isin(selection.frame.index)]
    body = []
    for record in records_of(others.sort_values("id")):
        twin = _twin(record, mine)
        if twin is None:
            continue
        usual = twin.config.method_options
        changed = {k: v for k, v in record.config.method_options.items() if v != usual.get(k)}
        if changed:
            body.append(_options_row(record, twin, changed, between_seeds))
    if not body:
        return ""
    head = ["method", "rate", "seed", "set", "mean without", "mean with", "difference"]
    known = "is taken from the methods with several seeds" if between_seeds else "is not known from one seed"
    return f"{table(body, head)}\n\nPaired over items. The variation between runs {known}."


def _twin(record: Record, candidates: list[Record]) -> Record | None:
    """Return the run that differs in the method's options only.

    It has the same test set.
    """
    if not (record.test and record.data):
        return None
    key = record.config.config_key_without("method_options", "data_hash")
    twins = (c for c in candidates if c.config.config_key_without("method_options", "data_hash") == key)
    twin = next(twins, None)
    if twin is None or twin.data is None or record.data.sha256["test"] != twin.data.sha256["test"]:
        return None
    return twin


def _options_row(
    record: Record, twin: Record, changed: dict[str, object], between_seeds: Spread | None
) -> list[object]:
    pair = [twin.items or {}], [record.items or {}]
    d = compare_apart(*pair, between_seeds) if between_seeds else compare(*pair)
    return [
        title_of(record.config.method), f"{record.config.learning_rate:g}",
        record.config.seed, ", ".join(f"`{k}={json.dumps(v)}`" for k, v in changed.items()),
        f"{twin.mean():.1f}", f"{record.mean():.1f}",
        f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p={d.p:.2g}",
    ]  # fmt: skip
