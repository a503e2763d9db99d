"""Tables of single runs.

They are of sweeps of the learning rate, router statistics, and effects of single options.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import pandas as pd

from bench.experiments.methods import title_of
from bench.experiments.profiles import SWEEP_SEED, TUNING_SEED
from bench.experiments.registry import TableEntry, tuning_groups_of
from bench.records.schema import Record
from bench.report.markdown import number, table
from bench.report.scores.rates import swept_runs
from bench.report.scores.selection import Selection, records_of, runs_of
from bench.report.stats import Spread, compare, compare_apart
from tasks import TASKS


def sweep_table(selection: Selection) -> str:
    """Return the validation scores of the sweep's runs, by method and learning rate."""
    sweep = swept_runs(selection.frame)
    is_search = bool((sweep["seed"] == TUNING_SEED).any())
    at_floor = selection.at_floor if is_search else None
    of_method = {
        method: runs_of(sweep, selection.experiment, TableEntry(method)).set_index("learning_rate")["record"]
        for method in tuning_groups_of(selection.entries)
    }
    rates = sorted({rate for runs in of_method.values() for rate in runs.index})
    body = []
    for method, runs in of_method.items():
        if len(runs):
            chosen = selection.rates.tuned.get(method)
            cells = [_sweep_cell(runs[rate], rate == chosen, at_floor) if rate in runs else "not run" for rate in rates]
            body.append([title_of(method), *cells])
    head = ["method", *(f"{rate:g}" for rate in rates)]
    if is_search:
        note = _search_note(selection, of_method)
    else:
        note = f"Mean over the validation sets, seed {SWEEP_SEED}. Bold: chosen."
        if any("not run" in row for row in body):
            note += " **This sweep is not complete**: a method's own rate is the best of those that were run."
    return f"{table(body, head, ['left', *['right'] * len(rates)])}\n\n{note.rstrip()}"


def _search_note(selection: Selection, of_method: Mapping[str, pd.Series]) -> str:
    """Say what the cells of a search are, and if it has ended."""
    grid, at_floor = selection.size.rates, selection.at_floor
    without = f" without {', '.join(sorted(TASKS[task].title for task in at_floor))}, at floor" if at_floor else ""
    note = (
        f"Mean over the validation sets{without} of the loss in nats per label token, and in brackets of the score. "
        f"Seed {TUNING_SEED}, which is in no other table. Bold: chosen, the lowest loss. "
    )
    open_ends = [
        title_of(method)
        for method, runs in of_method.items()
        if (rate := selection.rates.tuned.get(method)) in grid
        and not set(grid[max(0, grid.index(rate) - 1) : grid.index(rate) + 2]) <= set(runs.index)
    ]
    if open_ends:
        note += f"**This sweep is not complete**: a rate next to the best one was not run of {', '.join(open_ends)}. "
    return note + _by_accuracy(selection, of_method)


def _sweep_cell(record: Record, is_chosen: bool, at_floor: Collection[str] | None) -> str:
    """Return the score of a run, or of a search, which has tasks at floor or none, also its loss."""
    if record.status != "ok":
        return record.status + (f" by step {record.train.steps}" if record.train else "")
    mean = f"{record.mean('validation'):.1f}"
    if at_floor is not None:
        loss = f"{record.validation_loss(at_floor):.3f}"
        return f"**{loss}** ({mean})" if is_chosen else f"{loss} ({mean})"
    return f"**{mean}**" if is_chosen else mean


def _by_accuracy(selection: Selection, of_method: Mapping[str, pd.Series]) -> str:
    """Name the rates that validation accuracy would choose, where they differ from those of the loss."""
    others = []
    for method, runs in of_method.items():
        scores = {rate: one.mean("validation") for rate, one in sorted(runs.items()) if one.status == "ok"}
        chosen = selection.rates.tuned.get(method)
        if chosen not in scores:
            continue
        best = max(scores, key=lambda rate: scores[rate] or 0.0)
        if best != chosen:
            between = [rate for rate in selection.size.rates if min(best, chosen) < rate < max(best, chosen)]
            others.append(f"{title_of(method)} {best:g}" + (", more than one rate away" if between else ""))
    return f"By validation accuracy it would be {'; '.join(others)}." if others else ""


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
