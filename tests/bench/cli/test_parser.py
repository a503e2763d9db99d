"""The help of every command: what it does, an example that parses, its options and their defaults."""

import argparse
import io
import shlex
import sys

import pytest

from bench.cli.parser import main, make_parser
from bench.experiments.registry import EXPERIMENTS
from bench.regress import cli as regress_cli
from bench.speed import cli as speed_cli
from bench.teachers import cli as teachers_cli


def commands():
    return next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_every_command_and_option_has_a_help_line_and_a_default():
    others = {"list", "run", "score", "leaderboard", "report", "export", "export-task", "publish", "clean"}
    assert set(commands()) == {*EXPERIMENTS, *others}
    for name, command in commands().items():
        assert command.text.endswith("."), name
        for action in command._actions:
            assert action.help, (name, action.option_strings)
            assert not action.required or action.dest in ("adapter", "what", "task")


PARSERS = {
    "bench": make_parser,
    "bench.speed": speed_cli.make_parser,
    "bench.regress": regress_cli.make_parser,
    "bench.teachers": teachers_cli.make_parser,
}


@pytest.mark.parametrize("parser", [*(make() for make in PARSERS.values()), *commands().values()], ids=lambda p: p.prog)
def test_help_opens_with_a_sentence_and_an_example_that_parses(parser):
    usage, _, sentence, _, head, *rest = parser.format_help().splitlines()
    assert usage.startswith(f"usage: {parser.prog}") and len(usage) < 80
    assert sentence == parser.text and sentence.endswith(".")
    assert head == "example:" and f"  {parser.example.splitlines()[0]}" == rest[0]
    for example in parser.example.splitlines():
        words = shlex.split(example, comments=True)
        assert words[:2] == ["python", "-m"]
        PARSERS[words[2]]().parse_args(words[3:])


def test_a_mistyped_command_gets_the_nearest_one(capsys):
    for wrong, message in {
        "table22": "unknown command 'table22'; did you mean 'table2'? There are list, table1",
        "exports": "unknown command 'exports'; did you mean 'export'?",
        "fly": "unknown command 'fly'; there are list, table1",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            main([wrong])
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_without_all_letters_is_no_obstacle(monkeypatch, capsys, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--method", "mälora", "--results", str(tmp_path)])
    sys.stderr.flush()
    assert rb"unknown method 'm\xe4lora'" in sys.stderr.buffer.getvalue()
