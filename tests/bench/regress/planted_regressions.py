"""Plant regressions, and check that the comparison with the committed figures names them.

`make test-regress` runs this file. It takes a minute, so its name keeps it out of `make test`.
"""

import dataclasses
import itertools

import pytest

from bench.regress.cli import main
from bench.runs import run, setting
from malora import layer, routing
from malora.backends import BACKENDS
from malora.routing import Routing
from tasks.base import FORMATS


@pytest.fixture(autouse=True)
def without_caches():
    """Forget formatted and tokenized examples before and after a test."""

    def forget():
        setting._build.cache_clear()
        run._ENCODED.clear()

    forget()
    yield
    forget()


def moved(parts: str, capsys) -> dict[str, str]:
    """Compare, and return what to look at by the name of each figure that has moved."""
    code = main(["--only", parts])
    lines = capsys.readouterr().out.splitlines()
    found = {
        line.split()[1].rstrip(":"): after for line, after in itertools.pairwise(lines) if line.startswith("MOVED")
    }
    assert code == bool(found), lines
    return found


def test_a_slower_layer_is_named(monkeypatch, capsys):
    fast = BACKENDS["dense"].compute

    def compute_four_times(*arguments):
        return sum(0 * fast(*arguments) for _ in range(3)) + fast(*arguments)

    monkeypatch.setitem(BACKENDS, "dense", dataclasses.replace(BACKENDS["dense"], compute=compute_four_times))
    found = moved("layer", capsys)
    sizes = ("many_tokens", "one_token")
    assert set(found) == {f"layer.{method}.auto.{size}" for method in ("malora", "molora") for size in sizes}
    assert all("malora/backends" in text for text in found.values())


def test_a_changed_prompt_is_named(monkeypatch, capsys):
    letters = FORMATS["letters"]

    def say_it_otherwise(task, question):
        example = letters(task, question)
        return dataclasses.replace(example, prompt=example.prompt.replace("\nAnswer:", "\nThe answer:"))

    monkeypatch.setitem(FORMATS, "letters", say_it_otherwise)
    found = moved("data", capsys)
    assert {f"data.procedural.letters.{split}" for split in ("train", "validation", "test")} <= set(found)
    assert not any(".cloze." in name for name in found)
    assert all("tasks/base.py" in text for text in found.values())


def test_a_router_that_learns_from_the_balance_loss_alone_is_named(monkeypatch, capsys):
    """The run ends well, and its loss still falls."""
    monkeypatch.setattr(Routing, "gate", property(lambda self: self.probability.detach() * self.chosen))
    found = moved("training", capsys)
    assert "malora/routing.py" in found["training.malora.gradient.router.zero_tensors"]
    assert "training.malora.gradient.router_of_balance_loss.zero_tensors" not in found
    unaffected = ("training.lora.", "training.malora.status", "training.malora.parameters.", "training.base")
    assert not [name for name in found if name.startswith(unaffected)]


def test_a_router_without_any_gradient_is_named(monkeypatch, capsys):
    def route(*arguments):
        found = routing.route(*arguments)
        return found._replace(probability=found.probability.detach())

    monkeypatch.setattr(layer, "route", route)
    found = moved("training", capsys)
    assert "malora/routing.py" in found["training.malora.gradient.router.zero_tensors"]
    assert "malora/routing.py" in found["training.malora.gradient.router_of_balance_loss.zero_tensors"]
    assert not [name for name in found if name.startswith(("training.lora.", "training.base"))]
