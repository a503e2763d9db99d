"""The command `list`."""

import functools
import json

import pytest

import malora
from bench.cli import lists
from bench.cli.lists import LISTS
from bench.cli.parser import main
from bench.experiments.registry import EXPERIMENTS
from tasks import MIXTURES, TASKS
from tests import processes
from tests.malora.test_methods import LLAMA2_7B

REGISTRIES = {"methods": malora.METHODS, "tasks": TASKS, "mixtures": MIXTURES, "experiments": EXPERIMENTS}


@pytest.fixture(autouse=True, scope="module")
def read_records_once():
    """Read the published records once: it takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lists, "_published_records", functools.cache(lists._published_records))
        yield


def listed(what, capsys):
    assert main(["list", what, "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("what", REGISTRIES)
def test_every_name_has_a_line(what, capsys):
    assert set(LISTS) == set(REGISTRIES)
    rows = listed(what, capsys)
    assert list(rows) == list(REGISTRIES[what])
    assert main(["list", what]) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "name" and set(rule) <= {"-", " "} and "_" not in head
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(rows)


def test_a_user_starts_it_with_python(capsys):
    """In a process of its own, as all others here are not."""
    done = processes.run("bench", "list", "experiments")
    assert done.returncode == 0, done.stderr
    assert main(["list", "experiments"]) == 0
    assert done.stdout == capsys.readouterr().out


def test_sizes_are_those_of_the_adapters_and_of_the_published_records(capsys):
    methods = listed("methods", capsys)
    assert {name: methods[name]["trainable_at_7b"] for name in LLAMA2_7B} == LLAMA2_7B
    assert methods["malora-fixed-s"]["update_of_a_layer"] == "Σ g_t B_t P_t S, 8 experts, top 2, d=32, S frozen"
    assert methods["asylora"]["update_of_a_layer"] == "B A, A frozen"
    tasks = listed("tasks", capsys)
    assert tasks["arc_easy"]["test_items"] == 2376 and tasks["gsm8k"]["kind"] == "written answer, exact_match"
    assert tasks["mathematics"]["training_examples"] == 5000 and tasks["mathematics"]["test_items"] is None
    mixtures = listed("mixtures", capsys)
    assert mixtures["inter-open"]["training_examples"] == 6 * 5000
    assert mixtures["inter/code"]["trains_on"] == ["code"] and mixtures["inter/code"]["tests"] == ["humaneval"]
    experiments = listed("experiments", capsys)
    assert experiments["table12"]["rows"] == 16 and experiments["table12"]["methods"] == ["malora"]
