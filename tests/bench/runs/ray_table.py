"""Make Table 2 on small data. Arguments: folder of the base model, and options of the command."""

import sys
from dataclasses import replace

from bench.cli.parser import main
from bench.experiments.profiles import PROFILES
from tasks import Generator

SOURCE = Generator((("train", 160), ("validation", 8), ("test", 8)))
OPTIONS = "table2 --profile tiny --methods lora,malora --seeds 2 --model".split()


def make_table(model, *options):
    before = PROFILES["tiny"]
    PROFILES["tiny"] = replace(before, source=SOURCE, batch_size=8, checkpoint_every=5, warmup_ratio=0.0)
    try:
        return main([*OPTIONS, str(model), *map(str, options)])
    finally:
        PROFILES["tiny"] = before


if __name__ == "__main__":
    sys.exit(make_table(*sys.argv[1:]))
