"""EXPERIMENTS: the paper's tables and figures, and our own tables, as lists of runs.

This is the one place to add an experiment.

Learning rates are tuned for the methods in SWEPT only, over the same grid. Every other table row uses the rate of the
method that it is a variant of. Tuning all 16 settings of β and d in Table 12 would cost five times the table. Tuning
only some rows would bias the ranking.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import malora
from bench.experiments.methods import BASE, ELSEWHERE, TITLES, method_options, title_of
from bench.experiments.profiles import PROFILES, Profile
from bench.records.schema import RunConfig
from tasks import MIXTURES

SWEPT = ("lora", "asylora", "dora", "molora", "malora")
# Mixtures of the Hugging Face hub, and the mixtures of freely licensed data that replace them with --data.
OPEN = {"inter": "inter-open"}
RANKS = ("r", "lora_alpha", "d")  # options that the profile divides


@dataclass(frozen=True)
class TableEntry:
    """A row of a table: a method with options.

    Attributes:
        method: A name in METHODS, or BASE.
        title: Title as in the paper's table; by default that of the method.
        options: Options of the method's config at the paper's size. The profile divides ranks for a smaller model.
        single_task: Train each task or domain of the mixture by itself, "(ST)" in Table 1.
        seeds: Number of runs; None for the profile's.
        own_rate: Tune the learning rate of this method itself, also if it is a variant.
    """

    method: str
    title: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    single_task: bool = False
    seeds: int | None = None
    own_rate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or title_of(self.method))

    @property
    def tuning_group(self) -> str:
        """The method whose sweep chooses the learning rate."""
        if self.own_rate:
            return self.method
        return "molora" if self.method == "moasylora" else self.method.partition("-")[0]

    def changes(self, profile: Profile) -> dict[str, Any]:
        """Return the options at the profile's size."""
        return {k: v // profile.rank_divisor if k in RANKS else v for k, v in self.options.items()}

    def matches(self, config: RunConfig) -> bool:
        """Tell if a run has this method and these options."""
        if config.method != self.method:
            return False
        if self.method == BASE or self.method.startswith(ELSEWHERE):
            return True
        profile = PROFILES[config.profile]
        return config.method_options == method_options(self.method, profile, config.mixture, self.changes(profile))


@dataclass(frozen=True)
class Experiment:
    """A table or figure, of the paper unless its mixture is our own.

    Attributes:
        name: Name of the command.
        title: Title of the page.
        mixture: Mixture to train on; a profile may have a substitute.
        entries: Rows of the table.
        reference: Title of the row that the others are tested against; by default the row with the best mean.
        both_rates: Run the paper's learning rate as well as the tuned one.
        figure: Page of adapter analysis to write, "similarity" or "inside"; None for a table of scores.
    """

    name: str
    title: str
    mixture: str
    entries: tuple[TableEntry, ...]
    reference: str | None = None
    both_rates: bool = False
    figure: str | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of all rows, without repetitions."""
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def tuning_groups(self) -> list[str]:
        """The methods to sweep, in the order of the rows."""
        return tuning_groups_of(self.entries)

    @property
    def mixtures(self) -> set[str]:
        """The mixture and its substitutes."""
        substitutes = (profile.mixtures.get(self.mixture, self.mixture) for profile in PROFILES.values())
        return {self.mixture, open_data_mixture(self.mixture), *substitutes}

    def has(self, entry: TableEntry, config: RunConfig) -> bool:
        """Tell if a run belongs to a row, or to one of its single tasks."""
        mixture = config.mixture.rpartition("/")[0] if entry.single_task else config.mixture
        return mixture in self.mixtures and entry.matches(config)

    def chosen(self, methods: list[str] | None) -> list[TableEntry]:
        """Return the rows of some methods, or all for None.

        A method that the table does not have becomes a row of its own, with its own learning rate.
        """
        if methods is None:
            return list(self.entries)
        more = [TableEntry(method, own_rate=True) for method in methods if method not in self.methods]
        return [entry for entry in self.entries if entry.method in methods] + more


def tuning_groups_of(entries: Iterable[TableEntry]) -> list[str]:
    """Return the methods to sweep for these rows, in their order."""
    return list(dict.fromkeys(entry.tuning_group for entry in entries))


def open_data_mixture(mixture: str) -> str:
    """Return the mixture to use with `--data`.

    It is freely licensed data instead of the hub's, where there is a choice.
    """
    name, slash, part = mixture.partition("/")
    return OPEN.get(name, name) + slash + part


def single_task_mixtures(mixture: str) -> list[str]:
    """Return the mixtures of a single task or domain of this one."""
    return [name for name in MIXTURES if name.startswith(f"{mixture}/")]


def _sized(method: str, r: int, d: int | None = None, **options: Any) -> dict[str, Any]:
    """Return options that give a method these ranks at its usual scaling.

    The method's defaults are left out.
    """
    usual = vars(malora.make_config(method))
    options |= {} if r == usual["r"] else {"r": r, "lora_alpha": 2 * r}
    return options | ({} if d is None or d == usual["d"] else {"d": d})


def _malora(r: int, d: int, beta: float, options: dict[str, Any]) -> TableEntry:
    return TableEntry("malora", f"MALoRA r={r} d={d} β={beta:g}", options, seeds=1)


_TABLE1 = (
    TableEntry("lora", "LoRA (ST)", single_task=True, seeds=1),
    TableEntry("asylora", "AsyLoRA (ST)", single_task=True, seeds=1),
    TableEntry("lora"),
    *(TableEntry(method, seeds=1) for method in ("asylora", "dora", "moasylora")),
    *(TableEntry(method) for method in ("molora", "malora-small", "malora")),
)
_TABLE2 = tuple(TableEntry(method) for method in SWEPT)
_TABLE3 = (
    TableEntry("molora"),
    TableEntry("molora-r12", "MoLoRA r=12", seeds=1),
    TableEntry("molora-same-a", "MoLoRA same A_t r=12", seeds=1),
    TableEntry("malora"),
    TableEntry("malora-fixed-s", "fixed S_A r=16", seeds=1),
    TableEntry("malora-symmetric", "w/o asymmetry", seeds=1),
    TableEntry("malora-unshared-s", "w/o shared S_A", seeds=1),
    TableEntry("malora-frozen-p", "w/o ft P_t", seeds=1),
    TableEntry("malora-decomposed-b", "decomposing B_t", seeds=1),
)
_TABLE11 = (
    *(TableEntry("molora", f"MoLoRA r={r}", _sized("molora", r), seeds=1) for r in (4, 8, 16, 32)),
    *(
        # β = 1 is the method's default, so it is left out of the options.
        _malora(r, d, beta, _sized("malora", r, d) | ({} if beta == 1 else {"beta": beta}))
        for r, d, beta in ((6, 16, 0.3), (12, 32, 1.0), (24, 64, 3.5), (48, 128, 5.0))
    ),
)
_TABLE12 = tuple(
    _malora(r, d, beta, _sized("malora", r, d, beta=beta))
    for r, d in ((14, 16), (12, 32), (10, 48), (8, 64))
    for beta in (0.5, 1.0, 1.25, 2.0)
)
_ROUTED = tuple(TableEntry(method) for method in ("molora", "malora"))
_FIG2 = _ROUTED + tuple(TableEntry(e.method, f"{e.title} (ST)", single_task=True, seeds=2) for e in _ROUTED)
# AsyLoRA at twice LoRA's rank has about as many trainable parameters: 18 to 288 million at LLaMA-2 7B.
_FIG5 = tuple(
    TableEntry(method, f"{TITLES[method]} r={r * times}", _sized(method, r * times), seeds=1)
    for r in (8, 16, 32, 64, 128)
    for method, times in (("lora", 1), ("asylora", 2))
)

# Not the paper's; see docs/notes/protocol-2026-12-01.md.
_CLASSIFY = (*_TABLE2, TableEntry("malora-small"))

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        # The reference is not the best row: that may have a single seed, which would limit every test to its items.
        Experiment("table1", "Table 1: inter-domain", "inter", _TABLE1, reference="MALoRA"),
        Experiment("table2", "Table 2: intra-domain", "intra", _TABLE2, both_rates=True),
        Experiment("table3", "Table 3: ablations", "inter", _TABLE3, reference="MALoRA"),
        Experiment("table11", "Table 11 and Figure 4a: ranks", "inter", _TABLE11, reference="MALoRA r=12 d=32 β=1"),
        Experiment(
            "table12", "Table 12 and Figure 4b: β and d", "intra", _TABLE12, reference="MALoRA r=12 d=32 β=1.25"
        ),
        Experiment("fig2", "Figure 2: how alike experts are", "intra", _FIG2, figure="similarity"),
        Experiment("fig3", "Figure 3: spectra, movement and routing", "intra", _ROUTED, figure="inside"),
        Experiment("fig5", "Figure 5: AsyLoRA's rank", "inter/mathematics", _FIG5, reference="LoRA r=64"),
        Experiment("classify", "Classification: nine tasks that the small model can learn", "classify", _CLASSIFY),
    )
}
