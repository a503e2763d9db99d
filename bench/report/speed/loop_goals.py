"""The project's goals for speed as users run, and whether records of whole training programs reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.records.speed_schema import SpeedRecord, SpeedRow
from bench.report.markdown import number, table, text
from bench.report.speed.goals import NOT_MEASURED, RELATIONS, UNKNOWN
from bench.report.speed.summary import COMPILED_BACKBONE, age, fastest, named, ratio, seconds, tokens_per_second

Select = Callable[[SpeedRecord], SpeedRow | None]
Measure = Callable[[SpeedRecord], float | None]

MIN_ROUNDS = 2  # a ratio of one round may be a matter of the clock
GIB = 2**30
CAPTURED_PEAK_BYTES = 31 * GIB  # of the captured step before lean mode, at the 7B shape
DROPOUT = 0.05  # of all adapters, the paper's
UNSLOTH = "unsloth-lora"
WORK_7B = (("batch", 4), ("length", 1024), ("tokens", 16384))  # of a step on one GPU


@dataclass(frozen=True)
class LoopGoal:
    """A figure of training programs, and the value that the project wants it to have.

    Attributes:
        figure: Name of the figure.
        relation: Sign between the measured figure and the goal.
        goal: The value to reach.
        measure: Computes the figure of a record; None if the record does not have it. None if no record can.
        shape: Shape of the backbone.
        mode: Mode of the record.
        options: Options that the record must have.
        on_front_page: Whether the README shows it.
    """

    figure: str
    relation: str
    goal: float
    measure: Measure | None = None
    shape: str = "llama2-7b"
    mode: str = "loop"
    options: tuple[tuple[str, int], ...] = WORK_7B
    on_front_page: bool = False

    def accepts(self, record: SpeedRecord) -> bool:
        """Return whether the goal can be measured on the record."""
        asked = all(getattr(record.options, name) == value for name, value in self.options)
        is_alike = (record.shape, record.mode) == (self.shape, self.mode) and record.options.layers is None
        is_fair = record.options.rounds >= MIN_ROUNDS and record.options.dropout == DROPOUT
        return asked and is_alike and is_fair and record.provenance.cuda is not None

    def is_reached_by(self, value: float) -> bool:
        """Return whether a value reaches the goal."""
        return RELATIONS[self.relation][0](value, self.goal)

    def latest(self, records: list[SpeedRecord]) -> dict[str, tuple[float, SpeedRecord]]:
        """Return by device the figure of the latest record that has it, and the record."""
        found = {}
        for record in sorted(filter(self.accepts, records), key=age):
            value = self.measure(record) if self.measure else None
            if value is not None:
                found[record.provenance.device] = value, record
        return found


def _row(name: str) -> Select:
    return lambda record: _if_in_rounds(named(record, name))


def _if_in_rounds(row: SpeedRow | None) -> SpeedRow | None:
    """Return a row if enough rounds measured it; a call that was cut off has a last round without some rows."""
    if row is None:
        return None
    readings = max(map(len, row.sensors.values()), default=MIN_ROUNDS)  # one of each round
    return row if readings >= MIN_ROUNDS else None


def _ours(
    *,
    loops: tuple[str, ...],
    checkpointing: tuple[str, ...] = ("none",),
    base: str = "bf16",
    parallel: str | None = None,
) -> Select:
    """Select MALoRA's fastest row of some loops and modes of checkpointing, on one GPU or on all of the record's."""
    return lambda record: _if_in_rounds(
        fastest(
            record,
            lambda row: (
                (row.method == "malora" and row.loop in loops and row.checkpointing in checkpointing)
                and (row.base == base and row.parallel == parallel)
            ),
        )
    )


def _seconds(above: Select, below: Select) -> Measure:
    return lambda record: ratio(seconds(above(record)), seconds(below(record)))


def _tokens_per_second(above: Select, below: Select) -> Measure:
    return lambda record: ratio(tokens_per_second(record, above(record)), tokens_per_second(record, below(record)))


def _peak(above: Select, below: Select) -> Measure:
    return lambda record: ratio(_allocated(above(record)), _allocated(below(record)))


def _peak_over(row: Select, size: float) -> Measure:
    return lambda record: ratio(_allocated(row(record)), size)


def _allocated(row: SpeedRow | None) -> float | None:
    return None if row is None or row.status != "ok" or row.peak_bytes is None else row.peak_bytes.allocated


def _captured_step(method: str | None) -> Select:
    """Select the fastest captured row of a method, or of the base, in records of single steps."""
    return lambda record: fastest(record, lambda row: row.method == method and row.run == "captured")


_PLAIN = _ours(loops=("plain",))
_FAST = _ours(loops=("compiled", "captured"))
_CAPTURED = _ours(loops=("captured",))
_SAVING = ("full", "offload")
_CHECKPOINTED = _ours(loops=("plain", "captured"), checkpointing=_SAVING)
_LEAN = _ours(loops=("plain", "captured"), checkpointing=("lean",))
_NF4 = _ours(loops=("plain", "captured"), checkpointing=_SAVING, base="nf4")
_QLORA = _row("peft-lora-nf4-full")
_ALL_LOOPS = ("plain", "compiled", "captured")
_ALL_MODES = ("none", *_SAVING, "lean")
_ONE_GPU = _ours(loops=_ALL_LOOPS, checkpointing=_ALL_MODES)
_DDP, _FSDP = (_ours(loops=_ALL_LOOPS, checkpointing=_ALL_MODES, parallel=kind) for kind in ("ddp", "fsdp"))
_TWO_GPUS = (*WORK_7B, ("world", 2))

LOOP_GOALS = (
    LoopGoal("plain loop: MALoRA / Unsloth LoRA (dropout 0.05)", "≤", 1.00, _seconds(_PLAIN, _row(UNSLOTH)),
             on_front_page=True),
    LoopGoal("compiled or captured: MALoRA / Unsloth LoRA", "≤", 0.85, _seconds(_FAST, _row(UNSLOTH)),
             on_front_page=True),
    LoopGoal("compiled or captured: MALoRA / compiled floor", "≤", 1.09, _seconds(_FAST, _row(COMPILED_BACKBONE)),
             on_front_page=True),
    LoopGoal("compiled or captured: MALoRA / PEFT LoRA with compiled layers", "≤", 0.88,
             _seconds(_FAST, _row("peft-lora-compiled")),
             on_front_page=True),
    LoopGoal("checkpointed: MALoRA / Unsloth checkpointed, seconds", "≤", 0.90,
             _seconds(_CHECKPOINTED, _row(f"{UNSLOTH}-full")),
             on_front_page=True),
    LoopGoal("checkpointed: MALoRA / Unsloth checkpointed, peak memory", "≤", 1.00,
             _peak(_CHECKPOINTED, _row(f"{UNSLOTH}-full")),
             on_front_page=True),
    LoopGoal("lean: peak memory / 31 GiB", "≤", 0.65, _peak_over(_LEAN, CAPTURED_PEAK_BYTES)),
    LoopGoal("lean: MALoRA / MALoRA captured with all activations", "≤", 1.02, _seconds(_LEAN, _CAPTURED)),
    LoopGoal("NF4 base, checkpointed: MALoRA / PEFT QLoRA, seconds", "≤", 0.70, _seconds(_NF4, _QLORA),
             on_front_page=True),
    LoopGoal("NF4 base, checkpointed: MALoRA / PEFT QLoRA, peak memory", "≤", 1.05, _peak(_NF4, _QLORA),
             on_front_page=True),
    LoopGoal("70B shape on one GPU, NF4, checkpointed: peak memory, GB", "≤", 65, _peak_over(_NF4, 1e9),
             shape="llama3-70b", options=()),
    LoopGoal("two GPUs, DDP: tokens per second / one GPU's best", "≥", 1.9,
             _tokens_per_second(_DDP, _ONE_GPU), options=_TWO_GPUS),
    LoopGoal("two GPUs, FSDP2: tokens per second / one GPU's best", "≥", 1.7,
             _tokens_per_second(_FSDP, _ONE_GPU), options=_TWO_GPUS),
    LoopGoal("two GPUs, FSDP2: peak memory / one GPU's", "≤", 0.65,
             _peak(_FSDP, _ONE_GPU), options=_TWO_GPUS),
    LoopGoal("32,768 tokens of one text, checkpointed: MALoRA / floor", "≤", 1.06,
             _seconds(_CHECKPOINTED, _row("floor-full")), options=(("length", 32768),)),
    LoopGoal("7B decode, batch 1, captured: MALoRA / base", "≤", 1.06,
             _seconds(_captured_step("malora"), _captured_step(None)), mode="decode", options=(("batch", 1),)),
    LoopGoal("7B prefill of 4,096 tokens, captured: MALoRA / base", "≤", 1.08,
             _seconds(_captured_step("malora"), _captured_step(None)), mode="prefill", options=(("tokens", 4096),)),
    LoopGoal("llama3-8b shape, captured: MALoRA / compiled floor", "≤", 1.10,
             _seconds(_CAPTURED, _row(COMPILED_BACKBONE)), shape="llama3-8b"),
    LoopGoal("135M shape, captured: MALoRA / PEFT LoRA captured", "≤", 1.15,
             _seconds(_CAPTURED, _row("peft-lora-captured")), shape="smollm2-135m",
             options=(("batch", 16), ("length", 128))),
    LoopGoal("`table2 --profile small`: one run after the other / eight at once, seconds", "≥", 3),
)  # fmt: skip


def loop_goal_table(records: list[SpeedRecord]) -> str | None:
    """Return the goals with the latest figure of every device; None without a record of training programs."""
    if not any(record.mode == "loop" for record in records):
        return None
    goals = _table(LOOP_GOALS, records, names_records=True)
    note = _NOTE + _NOTE_ON_SEVERAL_GPUS if any(row.parallel for r in records for row in r.rows) else _NOTE
    return "\n\n".join(["## Goals for training as users run it", goals, note])


def front_page_loop_goals(records: list[SpeedRecord]) -> str:
    """Return the goals that the README shows, reached or not, with the latest figure of every device."""
    shown = [goal for goal in LOOP_GOALS if goal.on_front_page]
    if not any(goal.latest(records) for goal in shown):
        return NOT_MEASURED
    note = (
        "Ratios of training programs as users write them, timed by the wall clock at the 7B shape: MALoRA in its "
        "fastest form of the kind that is named, and the other package in its own. "
        "[All figures, reached or not](results/speed/table10.md#goals-for-training-as-users-run-it)."
    )
    return f"{_table(shown, records, names_records=False)}\n\n{note}"


def _table(goals: Sequence[LoopGoal], records: list[SpeedRecord], *, names_records: bool) -> str:
    """Return goals with the latest figure of every device."""
    found = [goal.latest(records) for goal in goals]
    devices = sorted({device for by_device in found for device in by_device})
    body = []
    for goal, by_device in zip(goals, found, strict=True):
        cells = [_cell(goal, by_device[device][0]) if device in by_device else UNKNOWN for device in devices]
        sources = [", ".join(f"`{record.id}`" for _, record in by_device.values())] if names_records else []
        body.append([goal.figure, f"{goal.relation} {goal.goal:g}", *cells, _verdict(goal, by_device), *sources])
    return table(body, ["figure", "goal", *map(text, devices), "reached", *(["record"] if names_records else [])])


_NOTE = (
    "Training programs are timed by the wall clock (`python -m bench.speed --loop`). Each ratio is of two rows of one "
    "call with two rounds or more, of the latest record that has both. MALoRA is represented by its fastest row of the "
    "kind that is named. Checkpointed rows keep the inputs of the decoder layers only, on the GPU or in host memory. "
    "Shapes are the 7B one unless a figure names another."
)
_NOTE_ON_SEVERAL_GPUS = (
    " On two GPUs a step has twice the tokens, and peak memory is the larger of the two. Both figures of FSDP2 are of "
    "its fastest row and of the fastest row on one GPU, whatever the checkpointing of either."
)


def _verdict(goal: LoopGoal, by_device: dict[str, tuple[float, SpeedRecord]]) -> str:
    """Say whether the figures of all devices reach the goal."""
    if not by_device:
        return UNKNOWN
    return "yes" if all(goal.is_reached_by(value) for value, _ in by_device.values()) else "**no**"


def _cell(goal: LoopGoal, value: float) -> str:
    return number(value, 3) if goal.is_reached_by(value) else f"**{number(value, 3)}**"
