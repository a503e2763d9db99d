"""Programs in processes that are forked from a template behave as programs that a user starts."""

import subprocess

import pytest

import malora
from tests import processes


@pytest.fixture
def run(tmp_path):
    def run_(code, *arguments, **options):
        (tmp_path / "program.py").write_text(code)
        return processes.run(tmp_path / "program.py", *arguments, folder=tmp_path, **options)

    return run_


def test_a_program_has_its_arguments_variables_and_folder(run, tmp_path):
    code = "import os, sys; print(sys.argv, os.environ['A'], os.getcwd(), __name__); print('e', file=sys.stderr)"
    done = run(code, "x", 1, environment={"A": "b"})
    assert done.stdout == f"{[str(tmp_path / 'program.py'), 'x', '1']} b {tmp_path} __main__\n"
    assert (done.returncode, done.stderr) == (0, "e\n")


@pytest.mark.parametrize("code, error", [("raise ValueError('no')", "ValueError: no"), ("exit('no')", "no")])
def test_a_program_that_fails_has_a_code_and_says_why(code, error, run):
    done = run(code)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == error
    assert run("exit(3)").returncode == 3


def test_a_program_does_not_see_what_tests_change(run, monkeypatch):
    monkeypatch.setattr(malora, "__version__", "changed")
    assert run("import malora; print(malora.__version__)").stdout.strip() not in ("changed", "")


def test_a_module_that_is_absent_cannot_be_imported(run):
    code = "import {}.report"
    assert run(code.format("bench")).returncode == 0
    done = run(code.format("bench"), absent=["bench"])
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


def test_processes_are_connected(run):
    code = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "found = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(found, dist.get_rank())\n"
        "print(found)\n"
        "dist.destroy_process_group()"
    )
    assert run(code, count=2).stdout == "[0, 1]\n" * 2


def test_if_one_process_fails_the_others_end(run):
    done = run("import os, time; exit(4) if os.environ['RANK'] == '1' else time.sleep(100)", count=2, timeout=60)
    assert done.returncode != 0  # torchrun's own code is 1


def test_a_program_that_takes_too_long_is_killed(run):
    with pytest.raises(subprocess.TimeoutExpired):
        run("import time; time.sleep(100)", timeout=0.2)
    assert run("print(1)").stdout == "1\n"
