"""The `tiny` profile's own world: five procedural tasks, and the text that its base model is trained on first.

The base learns from `pretraining_text` what any reader needs: to repeat a list, to count, and to answer a question with
the letter of a choice. It never meets the five kinds of question in `GENERATORS`, so it guesses on them, and what it
scores after training is what its adapter learned. Choices stand in one order, as BoolQ's yes and no do: a model of a
million parameters does not learn to find a choice's letter in the time that a CPU gives it.

Everything is drawn from the `random.Random` passed in; the facts to memorise follow from a fixed seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tasks.base import Question, letters

NAMES = tuple("ann bob cal dee eve fay gus hal ida jon kim leo mia ned ora pam".split())
OBJECTS = tuple("key coin book lamp rope cup map drum bell ring".split())
PLACES = tuple("kitchen garden attic cellar barn tower harbour market".split())
COLOURS = ("red", "blue", "green")
SEASONS = ("spring", "summer", "autumn", "winter")
SIDES = ("north", "east", "south", "west")
KINDS = ("fruit", "bird", "tool", "fish")
NUMBERS = tuple(str(n) for n in range(31))
NOUNS = tuple(onset + rhyme for onset in "bl dr fl gl kr pl sn tr".split() for rhyme in "ax ick omp".split())
YES_NO = ("yes", "no")

FRAME = ("Passage:", "Question:", "Answer:", "A", "B", "C", "D", "A.", "B.", "C.", "D.")
GRAMMAR = tuple(
    ". , ? the a an is are was in of and after before than less more most often seasons season what which who kind "
    "one now later it list hold does has saw sold bought near day last first second same say side turn turns right "
    "from face faces i tell me please say place name object".split()
)
VOCABULARY = tuple(
    dict.fromkeys(
        (*FRAME, *GRAMMAR, *YES_NO, *NAMES, *OBJECTS, *PLACES, *COLOURS, *SEASONS, *SIDES, *KINDS, *NUMBERS, *NOUNS)
    )
)

# Every invented noun has a kind, the same number of nouns each; nothing in the word gives it away.
KIND_OF = dict(zip(random.Random(20241030).sample(NOUNS, len(NOUNS)), KINDS * (len(NOUNS) // len(KINDS)), strict=True))


def _one_of(choices: Sequence[str], answer: str, text: str, context: str = "") -> Question:
    return Question(text, tuple(choices), tuple(choices).index(answer), context)


def _sentence(rng: random.Random, subject: str) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(('saw', 'sold', 'bought'))} {subject} near the {rng.choice(PLACES)} ."


def lexicon(rng: random.Random) -> Question:
    """Facts to memorise: the kind of an invented noun. The names vary so that a test question is a new one. 1 in 4."""
    noun = rng.choice(NOUNS)
    who = rng.sample(NAMES, 2)
    return _one_of(KINDS, KIND_OF[noun], f"{who[0]} and {who[1]} saw the {noun} , which kind is the {noun} ?")


def majority(rng: random.Random) -> Question:
    """Counting: which colour stands most often in a list. Chance is 1 in 3."""
    answer = rng.choice(COLOURS)
    others = [colour for colour in COLOURS if colour != answer]
    count = rng.randint(3, 5)
    words = [answer] * count + [o for o in others for _ in range(rng.randint(0, count - 1))]
    return _one_of(COLOURS, answer, "which is most often ?", " ".join(rng.sample(words, len(words))))


def comparison(rng: random.Random) -> Question:
    """Order: whether one number is less than another. Chance is 1 in 2."""
    low, high = sorted(rng.sample(range(31), 2))
    answer = rng.choice(YES_NO)
    first, second = (low, high) if answer == "yes" else (high, low)
    who = rng.sample(NAMES, 2)
    return _one_of(
        YES_NO, answer, f"has {who[0]} less than {who[1]} ?", f"{who[0]} has {first} , {who[1]} has {second} ."
    )


def seasons(rng: random.Random) -> Question:
    """Arithmetic modulo 4: the season so many seasons later. Chance is 1 in 4."""
    start, ahead = rng.randrange(4), rng.randrange(1, 4)
    text = f"{rng.choice(NAMES)} and {rng.choice(NAMES)} say {ahead} after {SEASONS[start]} , which season is it ?"
    return _one_of(SEASONS, SEASONS[(start + ahead) % 4], text)


def second(rng: random.Random) -> Question:
    """Position: the second word of a list. Chance is 1 in 3."""
    words = [rng.choice(COLOURS) for _ in range(rng.randint(3, 9))]
    return _one_of(COLOURS, words[1], "which is second ?", " ".join(words))


GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    function.__name__: function for function in (lexicon, majority, comparison, seasons, second)
}


def pretraining_text(rng: random.Random) -> str:
    """One document for the base: a list said twice, a count, or a question of a kind that is not in GENERATORS."""
    kind = rng.randrange(4)
    if kind == 0:
        words = rng.sample(VOCABULARY[len(FRAME) :], rng.randint(4, 10))
        return f"{' '.join(words)} . {' '.join(words)} ."
    if kind == 1:
        start, step, length = rng.randrange(12), rng.choice((1, 1, 2, 3)), rng.randint(4, 10)
        count = [str(n) for n in range(start, 31, step)][:length]
        return " ".join(count if rng.random() < 0.5 else reversed(count)) + " ."
    question = rng.choice((_word_class, _turn, _last, _season_named))(rng)
    example = letters("", question)
    return example.prompt + example.label


def _word_class(rng: random.Random) -> Question:
    kinds = {"name": NAMES, "place": PLACES, "object": OBJECTS}
    answer = rng.choice(tuple(kinds))
    word = rng.choice(kinds[answer])
    return _one_of(tuple(kinds), answer, f"what is {word} ?", _sentence(rng, f"the {rng.choice(OBJECTS)}"))


def _turn(rng: random.Random) -> Question:
    side = rng.randrange(4)
    name = rng.choice(NAMES)
    return _one_of(
        SIDES, SIDES[(side + 1) % 4], f"{name} turns right , which side is it ?", f"{name} faces {SIDES[side]} ."
    )


def _last(rng: random.Random) -> Question:
    words = [rng.choice(SIDES) for _ in range(rng.randint(2, 8))]
    return _one_of(SIDES, words[-1], "which is last ?", " ".join(words))


def _season_named(rng: random.Random) -> Question:
    season = rng.choice(SEASONS)
    context = f"{rng.choice(NAMES)} bought a {rng.choice(OBJECTS)} in {season} ."
    return _one_of(SEASONS, season, "which season was it ?", context)
