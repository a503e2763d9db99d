"""A process of several: train each row that is named, and print losses and weights as JSON."""

import itertools
import json
import sys

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from bench.models.backbone import SHAPES, backbone
from bench.speed.loops import distributed_programs, programs
from bench.speed.loops.rounds import batches
from bench.speed.loops.rows import all_rows
from bench.speed.steps import Workload

STEPS = 2
CPU = torch.device("cpu")
WORK = Workload("train", batch=2, length=16, tokens=64, dropout=0.0, vocab_size=512)  # two micro-batches


def main(names):
    programs.LEARNING_RATE = distributed_programs.LEARNING_RATE = 1e-2
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found = {}
    for name in names:
        base = backbone(SHAPES["toy"], 1, CPU)
        program = all_rows()[name].program(base, batches(WORK, CPU, rank, world), 0.0)
        losses = [loss.item() for loss in itertools.islice(program, STEPS)]
        weights = [parameter.detach() for parameter in base.parameters() if parameter.requires_grad]
        whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base.parameters())
        found[name] = {"losses": losses, "weights": sum(w.abs().double().sum().item() for w in whole), "held": held}
    print(json.dumps({"rank": rank, "rows": found}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
