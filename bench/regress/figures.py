"""Measured figures, and their comparison with committed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.records.regressions import Bound, Figure, Regressions, Value

# What a figure is, which decides its bounds:
# exact: the same everywhere, as a hash or a count
# here: the same with the same versions of packages
# number: a result of floating-point arithmetic; to the digit on the same machine
# cost: a ratio of times, which may be smaller but not larger
Kind = Literal["exact", "here", "number", "cost"]


class Measured(NamedTuple):
    """A measured figure.

    Attributes:
        value: A number or a text.
        kind: What it is, see `Kind`.
        least: Smallest bound of a "number" on other machines, in units of the value.
    """

    value: Value
    kind: Kind
    least: float = 0.0


Figures = dict[str, Measured]

# What to look at when a figure has moved, by the beginning of its name. The first that fits counts.
LOOK_AT = {
    "data.": "the prompts and the data of tasks/: templates in tasks/base.py, generation in tasks/procedural.py, "
    "cleaning and order in tasks/build.py",
    "training.base": "the base model of the tiny profile: bench/models/tiny.py, tasks/procedural.py and their packages",
    "training.lora.": "what all methods share, since PEFT's LoRA moved: data, bench/train, bench/models, "
    "bench/evaluate, or PEFT itself",
    "training.malora.status": "the traceback above: the run itself broke",
    "training.malora.gradient.router": "the router's gradient: malora/routing.py, malora/load_balancing.py, "
    "malora/backends",
    "training.malora.gradient.": "the backward pass and initialization: malora/backends, malora/factors.py, "
    "malora/initialization.py",
    "training.malora.parameters.": "malora/methods.py, malora/targets.py, bench/experiments/methods.py",
    "training.malora.router.": "malora/routing.py and malora/load_balancing.py",
    "training.malora.analysis.": "bench/evaluate/adapter_analysis.py and malora/analysis",
    "training.malora.validation": "scoring, if no loss moved: bench/evaluate; else training",
    "training.malora.test": "scoring, if no loss moved: bench/evaluate; else training",
    "training.": "malora/ and bench/train, if no figure of data or of LoRA moved",
    "imports.": "what `import malora` loads: python -X importtime -c 'import malora'",
    "layer.": "the forward and backward pass of a layer on a CPU: malora/layer.py, malora/adapter_layer.py, "
    "malora/backends",
    "suite.": "the slowest tests: make test ARGS=--durations=20",
    "speed.": "the fused path and the captured step: malora/fused, malora/backbone; a longer call of "
    "`python -m bench.speed` shows kernels and launches",
}


@dataclass(frozen=True)
class Comparison:
    """A figure, next to its committed value.

    Attributes:
        name: Name of the figure.
        committed: None if there is none.
        found: None if it could not be measured.
        bound: Values that are allowed, in words.
        has_moved: Whether the figure found is not one of them.
    """

    name: str
    committed: Value | None
    found: Value | None
    bound: str
    has_moved: bool

    @property
    def look_at(self) -> str:
        """What to look at if the figure has moved."""
        return next(text for beginning, text in LOOK_AT.items() if self.name.startswith(beginning))

    def text(self) -> str:
        """Return name, values, bound and what to look at, in two lines."""
        return (
            f"MOVED  {self.name}: {_text(self.found)}, committed {_text(self.committed)}, bound: {self.bound}\n"
            f"       look at {self.look_at}"
        )


def compare(
    committed: Regressions, found: Mapping[str, Value], parts: tuple[str, ...], is_same: bool
) -> list[Comparison]:
    """Compare measured figures with the committed ones of the same parts.

    A figure that only one side has is a regression too: either something was not measured, or `--update` is due.

    Args:
        committed: The committed figures.
        found: Measured values by name.
        parts: Parts that were measured: the names of their figures begin with them.
        is_same: Whether this machine equals the one of the committed figures.
    """
    base = found.get("training.base", committed.base_hash)
    result = []
    for name, figure in committed.figures.items():
        if name.partition(".")[0] not in parts:
            continue
        bound = figure.same if is_same else figure.elsewhere if base == committed.base_hash else figure.other_base
        if bound is not None:
            result.append(_compare(name, figure, bound, found.get(name)))
    unknown = [name for name in found if name not in committed.figures]
    result += [Comparison(name, None, found[name], "no committed figure; run --update", True) for name in unknown]
    return result


def _compare(name: str, figure: Figure, bound: Bound, found: Value | None) -> Comparison:
    value = figure.value
    if found is None or isinstance(found, str) or isinstance(value, str) or not bound:
        too_large = found != value
        if figure.only_above and isinstance(found, int | float) and isinstance(value, int | float):
            too_large = found > value
        return Comparison(name, value, found, "equal", too_large)
    if figure.only_above:
        return Comparison(name, value, found, f"at most {value + bound:.4g}", found > value + bound)
    return Comparison(name, value, found, f"± {bound:.2g}", not abs(found - value) <= bound)


def _text(value: Value | None) -> str:
    """Return a value as reports show it; hashes are shortened."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value[:60] if isinstance(value, str) and len(value) != 64 else str(value)[:12]
