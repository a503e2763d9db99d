"""The help and defaults of every command and option."""

import argparse

from bench.cli.parser import make_parser
from bench.experiments.registry import EXPERIMENTS


def test_every_command_and_option_has_a_help_line_and_a_default():
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(commands) == {*EXPERIMENTS, "run", "score", "leaderboard", "report", "publish"}
    for name, command in commands.items():
        assert command.description and command.description.endswith("."), name
        for action in command._actions:
            assert action.help, (name, action.option_strings)
            assert not action.required or action.dest == "adapter"
