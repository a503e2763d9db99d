"""Benchmark of a step of MALoRA and its baselines: time, memory, kernel launches.

python -m bench.speed --variant malora                   # compared with LoRA and the frozen backbone
python -m bench.speed --variant all --shape llama2-7b    # Table 10
python -m bench.speed --variant molora --sweep experts   # where sparse backends overtake dense ones
python -m bench.speed --loop plain,captured              # whole training programs, by the wall clock
python -m bench.speed --loop plain,captured --world 2    # the same, and on two GPUs

Models have random weights. The variants named "floor" are the frozen backbone without an adapter.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bench.command_line import Parser, folder, fraction, one_of, positive
from bench.errors import UserError, unknown_name
from bench.models.backbone import SHAPES, backbone
from bench.records import store
from bench.records.files import write_atomically
from bench.records.leftovers import remove_temporary_files
from bench.records.provenance import provenance
from bench.records.speed_schema import PeakRates, SpeedOptions, SpeedRecord, SpeedRow
from bench.report.speed import tables
from bench.runtime.processes import started_processes
from bench.speed.baselines import registered_baselines
from bench.speed.layer_sweep import SWEEPS, sweep_rows
from bench.speed.loops.call import measure_loops
from bench.speed.loops.rows import BASES, CHECKPOINTING, LOOPS
from bench.speed.profiler import backbone_flops, peak_rates
from bench.speed.rounds import COMPILE_OPTIONS, BenchmarkRow, ModelRow, measure
from bench.speed.steps import STEPS, Workload
from bench.speed.variants import ROUTED, select_variants

LOCAL = store.RESULTS / "local" / "speed"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the developers of our dependencies
    try:
        with registered_baselines():
            return _benchmark(options)
    except UserError as error:
        print(f"bench.speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        recorded = "the rows that were measured are recorded" if options.loop else "nothing was recorded"
        print(f"stopped; {recorded}.", file=sys.stderr)
        return 130


def make_parser() -> Parser:
    """Return the parser of the command line."""
    text, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(prog="python -m bench.speed", text=text, example=examples.partition("\n\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--variant",
        default="malora",
        metavar="A,B",
        help="methods (each with all its variants and its baselines), single variants, or all",
    )
    parser.add_argument(
        "--shape",
        type=one_of("shape", SHAPES),
        default="llama2-7b" if on_gpu else "toy",
        metavar="S",
        help=f"the backbone: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--mode", type=one_of("mode", STEPS), default="train", metavar="M", help=f"kind of step: {', '.join(STEPS)}"
    )
    parser.add_argument(
        "--sweep",
        type=one_of("sweep", SWEEPS),
        metavar="X",
        help=f"measure one linear layer over values of {', '.join(SWEEPS)}, instead of the whole backbone",
    )
    parser.add_argument(
        "--loop",
        metavar="A,B",
        help=f"measure whole training programs, in these loops: {', '.join(LOOPS)} (default: single steps)",
    )
    parser.add_argument(
        "--checkpointing",
        metavar="A,B",
        help=f"with --loop: what is kept for the backward pass: {', '.join(CHECKPOINTING)} (default: none)",
    )
    parser.add_argument(
        "--base",
        metavar="A,B",
        help=f"with --loop: precision of the frozen weights: {', '.join(BASES)} (default: bf16)",
    )
    parser.add_argument(
        "--world",
        type=positive,
        metavar="N",
        help="with --loop: number of GPUs; above 1, DDP and FSDP2 on all of them are measured too (default: 1)",
    )
    parser.add_argument(
        "--baselines",
        type=folder,
        metavar="DIR",
        help="with --loop: folder with Unsloth and what it needs (default: the one of the Makefile)",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="B", help="sequences per pass (default: the shape's; decode: 1)"
    )
    parser.add_argument("--length", type=positive, metavar="L", help="tokens per sequence (default: the shape's)")
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="T",
        help="tokens per training step, or new tokens in decode (default: the shape's)",
    )
    parser.add_argument("--dropout", type=fraction, default=0.05, metavar="P", help="adapter dropout, in training")
    parser.add_argument("--rounds", type=positive, default=5, metavar="K", help="rounds; each times every variant once")
    parser.add_argument(
        "--minutes", type=positive, metavar="M", help="start no round that would end later (default: all rounds)"
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="use N decoder layers only, to try something out")
    parser.add_argument(
        "--results", type=folder, default=LOCAL, metavar="DIR", help="folder for the record, its tables and its figure"
    )
    return parser


def _benchmark(options: argparse.Namespace) -> int:
    """Measure, write the record and the pages of its folder, and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _check_nothing_is_ignored(options)
    name, started = started_processes()
    if started > 1:
        raise UserError(f"{name} is {started}, but steps are measured in one process; start it without a launcher.")
    known = store.read_speed(options.results)  # before the measurement, so that a broken record costs no time
    work = _workload(options)
    if options.loop:
        with torch._dynamo.config.patch(COMPILE_OPTIONS):
            return _report(measure_loops(options, work, device), known, options.results)
    rows, flops = _rows(options, work, device, dtype)
    store.open_folder(options.results)
    remove_temporary_files(options.results)
    before = peak_rates(device, dtype)
    with torch._dynamo.config.patch(COMPILE_OPTIONS):
        found, rounds = measure(rows, options.rounds, device, 60 * (options.minutes or math.inf))
    record = SpeedRecord(
        shape=options.shape,
        mode="layer" if options.sweep else options.mode,
        options=SpeedOptions(
            variant=options.variant,
            sweep=options.sweep,
            batch=work.batch,
            length=work.length,
            tokens=work.tokens,
            dropout=work.dropout,
            rounds=rounds,
            layers=options.layers,
            flops=flops,
        ),
        provenance=provenance(device, jobs=1),
        peak_rates={"before": PeakRates(**before), "after": PeakRates(**peak_rates(device, dtype))},
        rows=[SpeedRow(**row) for row in found],
    )
    store.write_speed(record, options.results)
    return _report(record, known, options.results)


def _report(record: SpeedRecord, known: list[SpeedRecord], results: Path) -> int:
    """Write the pages of a folder with a new record, print the record's table, and return the exit status."""
    for name, page in tables.pages([*known, record]).items():
        write_atomically(results / name, page)
    print(tables.section(record))
    print(f"recorded in {results / 'runs' / record.id}.json; tables and figure in {results}")
    return 0


def _rows(
    options: argparse.Namespace, work: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[Sequence[BenchmarkRow], int | None]:
    """Return the rows to measure, and the backbone's matmul operations per step.

    The operations are None if there is no whole backbone.
    """
    names = options.variant.split(",")
    shape = SHAPES[options.shape]
    if options.sweep:
        for name in set(names) - set(ROUTED):
            raise UserError(f"--sweep measures routed methods: {unknown_name('one', name, ROUTED)}.")
        sizes = shape.config["hidden_size"], shape.config["intermediate_size"]
        linear = nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
        return sweep_rows(options.sweep, names, linear.requires_grad_(False), work), None
    chosen = select_variants(names, options.mode, device)  # first, because building the backbone takes time
    base = backbone(shape, options.layers, device)
    return [ModelRow(variant, base, work) for variant in chosen], backbone_flops(base, work)


def _check_nothing_is_ignored(options: argparse.Namespace) -> None:
    """Check that every option has an effect.

    Raises:
        UserError: If an option would be ignored.
    """
    for name in () if options.loop else ("checkpointing", "base", "baselines", "world"):
        if getattr(options, name):
            raise UserError(f"--{name} is for whole training programs; add --loop, or leave it out.")
    if options.loop and (options.sweep or options.mode != "train"):
        raise UserError("--loop measures training of a whole model; leave --sweep and --mode out.")
    if options.sweep and options.mode != "train":
        raise UserError(f"--sweep measures forward and backward of a layer; leave --mode {options.mode} out.")
    if options.sweep:
        for name in ("layers", "batch", "length", *(["tokens"] if options.sweep == "tokens" else [])):
            if getattr(options, name) is not None:
                raise UserError(f"--sweep {options.sweep} of one linear layer has no use for --{name}; leave it out.")
    depth = SHAPES[options.shape].config["num_hidden_layers"]
    if options.layers and options.layers > depth:
        raise UserError(f"--layers {options.layers} is too many: {options.shape} has {depth} layers. Choose fewer.")


def _workload(options: argparse.Namespace) -> Workload:
    """Return the work of a step, with the shape's defaults.

    Raises:
        UserError: If the numbers of tokens do not fit together.
    """
    shape, mode = SHAPES[options.shape], options.mode
    decode = mode == "decode"
    batch = options.batch or (1 if decode else shape.batch)
    length = options.length or (shape.prompt if decode else shape.length)
    tokens = options.tokens or {"decode": shape.new_tokens, "train": shape.tokens, "prefill": batch * length}[mode]
    if mode == "prefill" and tokens != batch * length:
        raise UserError(f"a prefill has --batch × --length = {batch * length} tokens; leave --tokens {tokens} out.")
    if mode == "train" and length == 1:
        raise UserError("--length 1 leaves no next token to train on; take 2 or more.")
    if mode == "train" and not options.sweep and tokens % (batch * length):
        raise UserError(
            f"--tokens {tokens} is no multiple of --batch {batch} × --length {length}, the tokens of a micro-batch."
        )
    return Workload(mode, batch, length, tokens, options.dropout, shape.config["vocab_size"])
