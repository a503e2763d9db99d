"""Measure the figures together with their spread, and derive the bounds of the committed file.

The spread on other machines is measured here, with the arithmetic of other machines: torch and MKL can be told to use
the instructions of older processors, which round in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from bench.errors import UserError
from bench.records.provenance import ROOT
from bench.records.regressions import Figure, Value
from bench.regress.figures import Figures, Measured

ARITHMETICS: tuple[dict[str, str], ...] = ({"ATEN_CPU_CAPABILITY": "default"}, {"MKL_CBWR": "COMPATIBLE"})
REPETITIONS = 3
# Real machines differ in more than these variables, so the spread is taken several times. Where the base model differs
# it is the largest cause, and it differs here as much as elsewhere.
SPREADS_OF_NUMBER, SPREADS_OF_NUMBER_OTHER_BASE, SPREADS_OF_COST = 10, 3, 3
# Least bounds of a time, relative to it: on the same machine, and on others, whose caches and clocks differ.
COST_SAME, COST_ELSEWHERE = 0.15, 0.5


def measure_bounds(here: Figures) -> dict[str, Figure]:
    """Return the figures of this process with bounds, from repetitions in processes of their own.

    Args:
        here: Figures of this process.
    """
    costs = ("imports", "layer")
    print("measuring the spread: a few minutes", file=sys.stderr, flush=True)
    repeated = [measure_in_process(costs, {}) for _ in range(REPETITIONS)]
    shared = [measure_in_process(("data", "training", *costs), variables) for variables in ARITHMETICS]
    own_base = []
    for variables in ARITHMETICS:
        with tempfile.TemporaryDirectory() as cache:  # the base model is trained with that arithmetic as well
            own_base.append(measure_in_process(("training",), variables | {"MALORA_CACHE": cache}))
    return {name: _figure(name, figure, repeated, shared, own_base) for name, figure in here.items()}


def measure_in_process(parts: Sequence[str], variables: Mapping[str, str]) -> dict[str, Value]:
    """Measure parts in a new process with some environment variables.

    Raises:
        UserError: The process fails.
    """
    command = [sys.executable, "-m", "bench.regress", "--only", ",".join(parts), "--json"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **variables}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}; its error is above.")
    found: dict[str, Value] = json.loads(done.stdout)
    return found


def _figure(
    name: str,
    measured: Measured,
    repeated: Sequence[Mapping[str, Value]],
    shared: Sequence[Mapping[str, Value]],
    own_base: Sequence[Mapping[str, Value]],
) -> Figure:
    """Return a figure with its bounds; see `measure_bounds`."""
    value, kind, least = measured
    if kind == "here":
        return Figure(value=value)
    if kind == "exact":
        return Figure(
            value=value,
            elsewhere=_zero_if_equal(name, value, [*shared, *own_base]),
            other_base=_zero_if_equal(name, value, own_base),
        )
    number = _numeric(value)
    if kind == "number":
        elsewhere = max(least, SPREADS_OF_NUMBER * _largest_distance(name, number, shared))
        other_base = max(elsewhere, SPREADS_OF_NUMBER_OTHER_BASE * _largest_distance(name, number, own_base))
        return Figure(value=value, same=0, elsewhere=_short(elsewhere), other_base=_short(other_base))
    here = [number, *(_numeric(found[name]) for found in repeated)]
    every = here + [_numeric(found[name]) for found in shared]
    typical = sorted(here)[len(here) // 2]
    same = max(COST_SAME * typical, SPREADS_OF_COST * (max(here) - min(here)))
    elsewhere = max(COST_ELSEWHERE * typical, same, SPREADS_OF_COST * (max(every) - min(every)))
    return Figure(
        value=typical, same=_short(same), elsewhere=_short(elsewhere), other_base=_short(elsewhere), only_above=True
    )


def _zero_if_equal(name: str, value: Value, runs: Sequence[Mapping[str, Value]]) -> int | None:
    """Return the bound 0, or None if a figure differs where only the arithmetic does."""
    return 0 if all(found.get(name, value) == value for found in runs) else None


def _largest_distance(name: str, number: float, runs: Sequence[Mapping[str, Value]]) -> float:
    return max(abs(_numeric(found[name]) - number) for found in runs)


def _numeric(value: Value) -> float:
    assert not isinstance(value, str)
    return float(value)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
