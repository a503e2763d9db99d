"""EXPERIMENTS: each a list of runs and a way to lay them out. The one place to add one.

A row's learning rate is that of its family: the methods in SWEPT are tuned, each at the same rates, and every other row
takes the rate of the one that it is a variant of. A sweep of each of 16 settings of β and d would cost five times the
table, and tuning some rows and not others would rank the tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import malora
from bench.experiments.methods import BASE, TITLES, method_options
from bench.experiments.profiles import PROFILES, Profile
from bench.records.schema import RunConfig
from tasks import MIXTURES

SWEPT = ("lora", "asylora", "dora", "molora", "malora")
SWEEP_SEED = 0
# What stands for a mixture of the hub where the data come from a folder.
OPEN = {"inter": "inter-open"}
RANKS = ("r", "lora_alpha", "d")


@dataclass(frozen=True)
class TableEntry:
    """A row of a table: a method with options.

    Attributes:
        method: a name in METHODS, or BASE.
        title: as in the paper's table; by default the method's.
        options: of the method's config, at the paper's size; the profile divides ranks for a smaller model.
        single_task: each task or domain of the mixture is trained by itself, "(ST)" in Table 1.
        seeds: runs; None for the profile's number.
        own_rate: tuned by itself, whatever its family.
    """

    method: str
    title: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    single_task: bool = False
    seeds: int | None = None
    own_rate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or TITLES.get(self.method, self.method))

    @property
    def tuning_group(self) -> str:
        """The method whose sweep chooses the rate."""
        if self.own_rate:
            return self.method
        return "molora" if self.method == "moasylora" else self.method.partition("-")[0]

    def changes(self, profile: Profile) -> dict[str, Any]:
        """The options at the profile's size."""
        return {k: v // profile.rank_divisor if k in RANKS else v for k, v in self.options.items()}

    def matches(self, config: RunConfig) -> bool:
        """Whether a run is of this method with these options."""
        if config.method != self.method:
            return False
        if self.method == BASE:
            return True
        profile = PROFILES[config.profile]
        return config.method_options == method_options(self.method, profile, config.mixture, self.changes(profile))


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        mixture: what is trained on; a profile may have a stand-in.
        reference: title of the row that the others are tested against; by default the one with the best mean.
        both_rates: the paper's rate is run beside each row's own.
        figure: None for a table of scores; else which page `bench.inside_report` makes of the records' insides.
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
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def tuning_groups(self) -> list[str]:
        """The methods to sweep, in the order of the rows."""
        return tuning_groups_of(self.entries)

    @property
    def mixtures(self) -> set[str]:
        """Its own and what may stand for it."""
        stand_ins = {profile.mixtures.get(self.mixture) for profile in PROFILES.values()} - {None}
        return {self.mixture, open_data_mixture(self.mixture), *stand_ins}

    def has(self, entry: TableEntry, config: RunConfig) -> bool:
        """Whether a run is one of a row's, or of its parts."""
        mixture = config.mixture.rpartition("/")[0] if entry.single_task else config.mixture
        return mixture in self.mixtures and entry.matches(config)

    def chosen(self, methods: list[str] | None) -> list[TableEntry]:
        """The rows of some methods, by default all; a method that the table does not have becomes a row."""
        if methods is None:
            return list(self.entries)
        more = [TableEntry(method, own_rate=True) for method in methods if method not in self.methods]
        return [entry for entry in self.entries if entry.method in methods] + more


def tuning_groups_of(entries: Iterable[TableEntry]) -> list[str]:
    return list(dict.fromkeys(entry.tuning_group for entry in entries))


def open_data_mixture(mixture: str) -> str:
    whole, slash, part = mixture.partition("/")
    return OPEN.get(whole, whole) + slash + part


def _sized(method: str, r: int, d: int | None = None, **options: Any) -> dict[str, Any]:
    """Options that give a method these ranks at its usual scaling, without those that it has anyway."""
    usual = malora.make_config(method)
    options |= {} if r == usual.r else {"r": r, "lora_alpha": 2 * r}
    return options | ({} if d is None or d == usual.d else {"d": d})


def _entries() -> dict[str, tuple[TableEntry, ...]]:
    one = {"seeds": 1}
    intra = tuple(TableEntry(method) for method in SWEPT)
    single = {"single_task": True, **one}
    table1 = (
        TableEntry("lora", "LoRA (ST)", **single),
        TableEntry("asylora", "AsyLoRA (ST)", **single),
        TableEntry("lora"),
        *(TableEntry(method, **one) for method in ("asylora", "dora", "moasylora")),
        *(TableEntry(method) for method in ("molora", "malora-small", "malora")),
    )
    table3 = (
        TableEntry("molora"),
        TableEntry("molora-r12", "MoLoRA r=12", **one),
        TableEntry("molora-same-a", "MoLoRA same A_t r=12", **one),
        TableEntry("malora"),
        TableEntry("malora-fixed-s", "fixed S_A r=16", **one),
        TableEntry("malora-symmetric", "w/o asymmetry", **one),
        TableEntry("malora-unshared-s", "w/o shared S_A", **one),
        TableEntry("malora-frozen-p", "w/o ft P_t", **one),
        TableEntry("malora-decomposed-b", "decomposing B_t", **one),
    )
    table11 = (
        *(TableEntry("molora", f"MoLoRA r={r}", _sized("molora", r), **one) for r in (4, 8, 16, 32)),
        *(
            TableEntry(
                "malora", f"MALoRA r={r} d={d} β={β:g}", _sized("malora", r, d) | ({} if β == 1 else {"beta": β}), **one
            )
            for r, d, β in ((6, 16, 0.3), (12, 32, 1.0), (24, 64, 3.5), (48, 128, 5.0))
        ),
    )
    table12 = tuple(
        TableEntry("malora", f"MALoRA r={r} d={d} β={β:g}", _sized("malora", r, d, beta=β), **one)
        for r, d in ((14, 16), (12, 32), (10, 48), (8, 64))
        for β in (0.5, 1.0, 1.25, 2.0)
    )
    # AsyLoRA at twice LoRA's rank has about as many trainable parameters: 18 to 288 million at LLaMA-2 7B.
    fig5 = tuple(
        TableEntry(method, f"{TITLES[method]} r={r * times}", _sized(method, r * times), **one)
        for r in (8, 16, 32, 64, 128)
        for method, times in (("lora", 1), ("asylora", 2))
    )
    routed = tuple(TableEntry(method) for method in ("molora", "malora"))
    apart = tuple(TableEntry(e.method, f"{e.title} (ST)", single_task=True, seeds=2) for e in routed)
    return {"table1": table1, "table2": intra, "table3": table3, "table11": table11, "table12": table12,
            "fig2": routed + apart, "fig3": routed, "fig5": fig5}  # fmt: skip


_ENTRIES = _entries()
EXPERIMENTS: dict[str, Experiment] = {
    name: Experiment(name, title, mixture, _ENTRIES[name], **options)
    for name, title, mixture, options in (
        # Not the best row: that may be one of a single seed, which would limit every test to its items.
        ("table1", "Table 1: inter-domain", "inter", {"reference": "MALoRA"}),
        ("table2", "Table 2: intra-domain", "intra", {"both_rates": True}),
        ("table3", "Table 3: ablations", "inter", {"reference": "MALoRA"}),
        ("table11", "Table 11 and Figure 4a: ranks", "inter", {"reference": "MALoRA r=12 d=32 β=1"}),
        ("table12", "Table 12 and Figure 4b: β and d", "intra", {"reference": "MALoRA r=12 d=32 β=1.25"}),
        ("fig2", "Figure 2: how alike experts are", "intra", {"figure": "similarity"}),
        ("fig3", "Figure 3: spectra, movement and routing", "intra", {"figure": "inside"}),
        ("fig5", "Figure 5: AsyLoRA's rank", "inter/mathematics", {"reference": "LoRA r=64"}),
    )
}


def parts(mixture: str) -> list[str]:
    """The mixtures that train one task or domain of this one."""
    return [name for name in MIXTURES if name.startswith(f"{mixture}/")]
