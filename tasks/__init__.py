"""Tasks and mixtures of tasks for training and evaluation.

`build` makes the examples of a mixture from a source of records, a prompt format and a seed:

    data = build(MIXTURES["intra"], Folder(Path("data")), format="letters", seed=0)
    data.train          # training examples of all tasks, blended
    data.test["piqa"]   # test examples of one task
"""

from tasks.base import FORMATS, Example, Question, Source, Task, WrittenExample
from tasks.build import MixtureData, build
from tasks.errors import DataError, UserError
from tasks.registry import MIXTURES, TASKS, Mixture
from tasks.sources import Folder, Generator, Hub

__all__ = [
    "FORMATS",
    "MIXTURES",
    "TASKS",
    "DataError",
    "Example",
    "Folder",
    "Generator",
    "Hub",
    "Mixture",
    "MixtureData",
    "Question",
    "Source",
    "Task",
    "UserError",
    "WrittenExample",
    "build",
]
