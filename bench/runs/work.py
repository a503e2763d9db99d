"""The size of a run in steps and tokens, and what its first step tells about its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bench.experiments.methods import BASE, ELSEWHERE
from bench.records.schema import RunConfig
from tasks import TASKS, Example, MixtureData

# A frozen model of P weights takes 2 P operations per token forward, and as many for the gradients of its activations.
FLOPS_PER_WEIGHT = {"training": 4, "scoring": 2}
CHARACTERS_PER_TOKEN = 4  # of English text, roughly
MIN_SECONDS_OF_FIRST_STEP = 1.0  # a faster run has its first line of progress soon


@dataclass(frozen=True)
class Work:
    """The size of a run."""

    steps: int
    training_tokens: float
    items: int
    scored_tokens: float


def work_of(config: RunConfig, data: MixtureData) -> Work:
    """Return the size of a run.

    The base and adapters from elsewhere are not trained, and scored on the test sets alone.
    """
    trains = config.method != BASE and not config.method.startswith(ELSEWHERE)
    scored = [
        example
        for split in ([data.validation, data.test] if trains else [data.test])
        for items in split.values()
        for example in items[: config.max_items]
    ]
    steps = config.epochs * ceil(len(data.train) / config.batch_size) if trains else 0
    share = min(1.0, config.max_steps / steps) if config.max_steps and steps else 1.0
    training_tokens = config.epochs * sum(_tokens(e.prompt + e.label) for e in data.train) if trains else 0.0
    return Work(
        round(share * steps),
        share * training_tokens,
        len(scored),
        sum(_scored_tokens(e, config.format) for e in scored),
    )


def _scored_tokens(example: Example, format: str) -> float:
    """Return the tokens that scoring an item processes.

    Letters share one pass over the prompt. Whole answers take a pass each.
    """
    writing = getattr(TASKS.get(example.task), "writing", None)
    if writing:
        return _tokens(example.prompt) + float(writing.max_new_tokens)
    prompts = len(example.choices) if format == "cloze" else 1
    return prompts * _tokens(example.prompt) + sum(map(_tokens, example.choices))


def _tokens(text: str) -> float:
    return len(text) / CHARACTERS_PER_TOKEN


def time_left(config: RunConfig, data: MixtureData, tokens: int, per_token: float, steps: int) -> str:
    """Return for people how long training and scoring take: "12 min of training, and then about 9 min of scoring".

    Scoring has half of the matrix operations of training.

    Args:
        config: Configuration of the run.
        data: Its data.
        tokens: Tokens of the training examples, once.
        per_token: Seconds of training per token.
        steps: Steps that are left.
    """
    training = per_token * tokens / len(data.train) * config.batch_size * steps
    # The tokenizer has another number of characters per token than `CHARACTERS_PER_TOKEN`.
    scored = work_of(config, data).scored_tokens * tokens / sum(_tokens(e.prompt + e.label) for e in data.train)
    scoring = per_token * scored * FLOPS_PER_WEIGHT["scoring"] / FLOPS_PER_WEIGHT["training"]
    return f"{duration(training)} of training, and then about {duration(scoring)} of scoring"


def first_step(
    config: RunConfig, data: MixtureData, tokens: int, say: Callable[[str], None]
) -> Callable[[float, int, int], None]:
    """Return a function that says after the first step how long the run takes, for `bench.train.loop.train`.

    Args:
        config: Configuration of the run.
        data: Its data.
        tokens: Tokens of the training examples, once.
        say: Shows a line.
    """

    def measured(seconds: float, tokens_of_step: int, steps_left: int) -> None:
        if seconds >= MIN_SECONDS_OF_FIRST_STEP:
            left = time_left(config, data, tokens, seconds / tokens_of_step, steps_left)
            say(f"by the first step, which took {duration(seconds)}: another {left}")

    return measured


def duration(seconds: float) -> str:
    """Return a duration for people: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
