"""Make the base model of the tiny profile again, and compare it with the one in the repository.

`python -m bench.models.make_tiny FOLDER` takes about a minute. The model is the same to the bit on the kind of
processor that the shipped one was made on; `tiny-base/README.md` names it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.models import tiny
from bench.models.base import ONE_FILE, TINY_FOLDER


def compare(folder: Path) -> str:
    """Return a line on how the weights of a folder differ from the shipped ones."""
    ours, shipped = (load_file(one / ONE_FILE) for one in (folder, TINY_FOLDER))
    if all(torch.equal(ours[name], weights) for name, weights in shipped.items()):
        return "the same weights as the shipped base, to the bit"
    difference = sum(float((ours[name] - weights).square().sum()) for name, weights in shipped.items())
    size = sum(float(weights.square().sum()) for weights in shipped.values())
    return (
        f"other weights than the shipped base: they differ by {(difference / size) ** 0.5:.1%} of its norm. "
        "This is expected on another kind of processor or with another torch."
    )


def main(arguments: list[str] | None = None) -> None:
    """Train the model into a folder and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.make_tiny", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write the model to")
    folder: Path = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    tiny.train_base(folder)
    print(f"{folder}: {compare(folder)}")


if __name__ == "__main__":
    main()
