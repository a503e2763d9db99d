"""Seconds, memory and launches of a step, beside the frozen backbone's and beside what a user would take instead.

python -m bench.speed --variant malora                   # against LoRA and the floor
python -m bench.speed --variant all --shape llama2-7b    # Table 10
python -m bench.speed --variant molora --sweep experts   # where sparse work overtakes dense

The floor is the same backbone, frozen, without an adapter: forward, and backward down to the activations. Weights are
random. The command line; composition only.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings

import torch
from torch import nn

from bench.command_line import Help, folder, fraction, one_of, positive
from bench.errors import UserError
from bench.models.backbone import SHAPES, backbone
from bench.records import store
from bench.records.provenance import provenance
from bench.records.schema import PeakRates, SpeedOptions, SpeedRecord, SpeedRow
from bench.report.speed import tables
from bench.speed.baselines import registered_baselines
from bench.speed.layer_sweep import SWEEPS, sweep_rows
from bench.speed.profiler import backbone_flops, ceilings
from bench.speed.rounds import ModelRow, measure
from bench.speed.steps import STEPS, Workload
from bench.speed.variants import ROUTED, choose

# More variants share one decoder layer's code than torch.compile expects. Where it would give up and run a row eagerly
# after all, that row is to fail.
COMPILE = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024, "fail_on_recompile_limit_hit": True}
LOCAL = store.RESULTS / "local" / "speed"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to their developers
    try:
        with registered_baselines():
            return _speed(options)
    except UserError as error:
        print(f"bench.speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was recorded.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed", description=__doc__.splitlines()[0], formatter_class=Help
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--variant",
        default="malora",
        metavar="A,B",
        help="methods (their rows, and what they are compared with), rows by name, or all",
    )
    parser.add_argument(
        "--shape",
        type=one_of("shape", SHAPES),
        default="llama2-7b" if on_gpu else "toy",
        metavar="S",
        help=f"the backbone: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--mode", type=one_of("mode", STEPS), default="train", metavar="M", help=f"what a step is: {', '.join(STEPS)}"
    )
    parser.add_argument(
        "--sweep",
        type=one_of("sweep", SWEEPS),
        metavar="X",
        help=f"one linear map over many values of one of {', '.join(SWEEPS)}, instead of the whole backbone",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="B", help="sequences a pass (default: the shape's; decode: 1)"
    )
    parser.add_argument("--length", type=positive, metavar="L", help="tokens a sequence (default: the shape's)")
    parser.add_argument(
        "--tokens", type=positive, metavar="T", help="tokens a training step, or made in decode (default: the shape's)"
    )
    parser.add_argument("--dropout", type=fraction, default=0.05, metavar="P", help="of the adapters, in training")
    parser.add_argument("--rounds", type=positive, default=5, metavar="K", help="how often every row has its turn")
    parser.add_argument(
        "--minutes", type=positive, metavar="M", help="begin no round that would end later (default: all rounds)"
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="cut the depth, to try things out")
    parser.add_argument(
        "--results", type=folder, default=LOCAL, metavar="DIR", help="for the record, its tables and its figure"
    )
    return parser


def _speed(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _check_nothing_is_ignored(options)
    known = store.read_speed(options.results)  # a broken record is better found before the measurement than after
    work = _work(options)
    names = options.variant.split(",")
    if options.sweep:
        if unknown := set(names) - set(ROUTED):
            raise UserError(f"--sweep takes mixtures of ours, {', '.join(ROUTED)}; not {', '.join(sorted(unknown))}.")
        config = SHAPES[options.shape].config
        linear = nn.Linear(config["hidden_size"], config["intermediate_size"], bias=False, device=device, dtype=dtype)
        rows = sweep_rows(options.sweep, names, linear.requires_grad_(False), work)
    else:
        chosen = choose(names, options.mode, device)
        base = backbone(SHAPES[options.shape], options.layers, device)
        rows = [ModelRow(variant, base, work) for variant in chosen]
    store.open_folder(options.results)
    before = ceilings(device, dtype)
    with torch._dynamo.config.patch(COMPILE):
        found, rounds = measure(rows, options.rounds, device, 60 * (options.minutes or math.inf))
    made = SpeedRecord(
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
            flops=None if options.sweep else backbone_flops(base, work),
        ),
        provenance=provenance(device, jobs=1),
        peak_rates={"before": PeakRates(**before), "after": PeakRates(**ceilings(device, dtype))},
        rows=[SpeedRow(**row) for row in found],
    )
    path = store.write_speed(made, options.results)
    for name, page in tables.pages([*known, made]).items():
        (options.results / name).write_text(page)
    print(tables.section(made))
    print(f"recorded in {path}; tables and figure in {options.results}")
    return 0


def _check_nothing_is_ignored(options: argparse.Namespace) -> None:
    if options.sweep and options.mode != "train":
        raise UserError(f"--sweep measures forward and backward of a layer; leave --mode {options.mode} out.")
    if options.sweep:
        for name in ("layers", "batch", "length", *(["tokens"] if options.sweep == "tokens" else [])):
            if getattr(options, name) is not None:
                raise UserError(f"--sweep {options.sweep} of one linear map has no use for --{name}; leave it out.")
    depth = SHAPES[options.shape].config["num_hidden_layers"]
    if options.layers and options.layers > depth:
        raise UserError(f"--layers {options.layers} cuts nothing: {options.shape} has {depth} layers.")


def _work(options: argparse.Namespace) -> Workload:
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
        raise UserError(f"--tokens {tokens} is no multiple of --batch {batch} × --length {length}: micro-batches.")
    return Workload(mode, batch, length, tokens, options.dropout, shape.config["vocab_size"])
