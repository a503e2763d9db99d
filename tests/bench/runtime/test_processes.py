"""Processes that share a run know of each other, or are refused."""

import pytest
from accelerate.state import AcceleratorState, GradientState

from bench.errors import UserError
from bench.runtime import processes as module
from bench.runtime.processes import WORLD_SIZES, make_accelerator, processes
from tests.processes import run


def test_without_a_launcher_there_is_one():
    assert processes().num_processes == 1 and processes().is_main_process


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_processes_that_are_not_connected_are_refused(name, monkeypatch):
    """A script may set the variable without a launcher."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name} is 2"):
        processes()


def test_a_state_that_was_made_without_the_cpu_is_refused(monkeypatch):
    """accelerate keeps the first state, and without `cpu=True` that is of one process."""
    assert processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="not connected"):
        processes()


def test_two_processes_are_counted():
    """`accelerate launch` starts one on a CPU, and a test would compare it with itself. torchrun starts two."""
    launcher = ("accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m")
    done = run(*launcher, "tests.bench.launch")
    assert done.returncode != 0 and "Num processes: 1" in done.stderr


@pytest.fixture
def _fresh_states():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_states")
def test_gradient_accumulation_of_the_launcher_is_refused(monkeypatch):
    """With it accelerate divides every loss."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="micro-batches"):
        make_accelerator("no")


@pytest.mark.usefixtures("_fresh_states")
def test_a_split_model_is_refused(monkeypatch):
    """A process would have a part of the adapter only."""
    monkeypatch.setattr(module, "DATA_PARALLEL", ())
    with pytest.raises(UserError, match="data-parallel only"):
        make_accelerator("no")
