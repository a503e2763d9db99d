"""The `tiny` profile: five procedural tasks, and the text that a tiny base model is trained on first.

The base learns from `pretraining_text` what any reader needs: to copy, to look a pair up, to count on, to tell which
of two numbers is less, and to answer with the letter of a listed choice. It never meets the five kinds of question
in `GENERATORS`, so it guesses on them, and what it scores after training is what its adapter learned. Everything is
drawn from the `random.Random` passed in; the facts to memorise follow from a word's place in a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tasks.base import Question, cloze, letters

NAMES = tuple("ann bob cal dee eve fay gus hal ida jon kim leo mia ned ora pam".split())
PLACES = tuple("kitchen garden attic cellar barn tower harbour market".split())
OBJECTS = tuple("key coin book lamp rope cup map drum".split())
COLOURS = tuple("red blue green black white pink brown grey".split())
DAYS = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
NUMBERS = tuple(str(n) for n in range(31))
KINDS = tuple("fruit bird tool fish stone".split())
NOUNS = tuple(onset + rhyme for onset in "bl dr fl gl kr pl sn tr".split() for rhyme in "ax ick omp unt ery".split())
LETTERS = tuple("ABCDE")
FRAME = ("Passage:", "Question:", "Answer:", *(f"{letter}." for letter in LETTERS))
GRAMMAR = tuple(
    ". , ; : ? < > the a is in has of and does like likes what which who where most often met at near by saw sold "
    "not one pick say next after before days leaves returns later on day kind with list first last comes to".split()
)
VOCABULARY = (*FRAME, *LETTERS, *GRAMMAR, *NAMES, *PLACES, *OBJECTS, *COLOURS, *DAYS, *NUMBERS, *KINDS, *NOUNS)

# An invented noun's kind, dealt out once and for all: eight nouns of each kind.
KIND_OF = dict(zip(NOUNS, random.Random(20).sample(KINDS * 8, len(NOUNS)), strict=True))


def _question(rng: random.Random, text: str, right: str, wrong: Sequence[str], context: str = "") -> Question:
    """The right answer among the wrong ones at a place drawn evenly, so that no place is worth guessing."""
    choices = rng.sample((right, *wrong), 1 + len(wrong))
    return Question(text, tuple(choices), choices.index(right), context)


def _others(rng: random.Random, words: Sequence[str], right: str, count: int) -> list[str]:
    return rng.sample([word for word in words if word != right], count)


# The five tasks


def lexicon(rng: random.Random) -> Question:
    """Which kind of thing an invented noun is: 40 facts to memorise, told apart from a second noun. Chance 1/4."""
    noun, other = rng.sample(NOUNS, 2)
    right = KIND_OF[noun]
    verb, place = rng.choice(("met", "saw", "sold")), rng.choice(PLACES)
    text = f"what kind is the {noun} {verb} near the {place} by the {other} ?"
    return _question(rng, text, right, _others(rng, KINDS, right, 3))


def comparison(rng: random.Random) -> Question:
    """Who of three has most: numbers compared across a passage, the answer a name. Chance 1/3."""
    names, numbers = rng.sample(NAMES, 3), rng.sample(NUMBERS, 3)
    context = " , ".join(f"{name} has {number}" for name, number in zip(names, numbers, strict=True)) + " ."
    right = max(zip(names, numbers, strict=True), key=lambda pair: int(pair[1]))[0]
    return _question(rng, "who has most ?", right, [name for name in names if name != right], context)


def majority(rng: random.Random) -> Question:
    """Which of three colours a list of nine names most often, be it by one: counting. Chance 1/3."""
    right, *wrong = rng.sample(COLOURS, 3)
    counts = rng.choice(((4, 3, 2), (5, 2, 2), (5, 3, 1)))
    words = [word for word, count in zip((right, *wrong), counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    return _question(rng, "which one most often ?", right, wrong, " ".join(words) + " .")


def weekday(rng: random.Random) -> Question:
    """The day some days after another: addition modulo 7, the base knows only which day comes next. Chance 1/4."""
    start, days = rng.randrange(7), rng.randrange(2, 7)
    right = DAYS[(start + days) % 7]
    name, place, other = rng.choice(NAMES), rng.choice(PLACES), rng.choice(PLACES)
    text = f"{name} leaves the {place} on {DAYS[start]} and returns to the {other} {days} days later . on which day ?"
    return _question(rng, text, right, _others(rng, DAYS, right, 3))


def two_hops(rng: random.Random) -> Question:
    """Where a thing is, told by who has it and where they are: two look-ups in a row. Chance 1/3."""
    names, things, places = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3), rng.sample(PLACES, 3)
    facts = [f"{name} has the {thing} ." for name, thing in zip(names, things, strict=True)]
    facts += [f"{name} is in the {place} ." for name, place in zip(names, places, strict=True)]
    rng.shuffle(facts)
    asked = rng.randrange(3)
    wrong = [place for place in places if place != places[asked]]
    return _question(rng, f"where is the {things[asked]} ?", places[asked], wrong, " ".join(facts))


GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    "lexicon": lexicon,
    "comparison": comparison,
    "majority": majority,
    "weekday": weekday,
    "two_hops": two_hops,
}

# The base's training text

CLASSES = (NAMES, PLACES, OBJECTS, COLOURS, DAYS, NUMBERS, KINDS, NOUNS)
WORDS = tuple(word for words in CLASSES for word in words)


def _mixed(rng: random.Random) -> Sequence[str]:
    """Words to fill an exercise with: of one class half of the time, else any."""
    return rng.choice(CLASSES) if rng.random() < 0.5 else WORDS


def _pairs(rng: random.Random) -> str:
    """Pairs listed, then again in other orders: looking up what went with a word."""
    count = rng.randint(2, 5)
    keys, values = rng.sample(NAMES + OBJECTS + NOUNS, count), rng.sample(_mixed(rng), count)
    pairs = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
    return " , ".join(pairs + rng.choices(pairs, k=6))


def _count(rng: random.Random) -> str:
    """Days and numbers in order, and which of two numbers is less."""
    start, length = rng.randrange(24), rng.randint(3, 6)
    numbers = NUMBERS[start : start + length]
    days = (DAYS * 2)[start % 7 :][:length]
    signs = []
    for _ in range(4):
        first, second = rng.sample(range(31), 2)
        signs.append(f"{first} {'<' if first < second else '>'} {second}")
    return " ; ".join((" ".join(numbers), " ".join(days), *signs))


def _binding(rng: random.Random, frame: str) -> str:
    """Listed choices, then their words in any order, each with its letter: which letter stands before a word."""
    pairs = list(zip(LETTERS, rng.sample(_mixed(rng), rng.randint(2, 5)), strict=False))
    listed = [f"{letter}. {word}" for letter, word in pairs]
    return "\n".join(listed + [frame.format(word=word, letter=letter) for letter, word in rng.choices(pairs, k=8)])


def _bare(rng: random.Random) -> str:
    return _binding(rng, "{word} {letter}")


def _answered(rng: random.Random) -> str:
    return _binding(rng, "{word} Answer: {letter}")


def _picked(rng: random.Random) -> str:
    return _binding(rng, "Question: pick {word} ? Answer: {letter}")


def _pick(rng: random.Random) -> str:
    """Two questions that say their answer outright, each with its own choices."""
    return "\n".join(_asked(rng, f"pick {words[0]} ?", words) for words in (_some(rng), _some(rng)))


def _look_up(rng: random.Random) -> str:
    """A question on one of the pairs that a passage lists."""
    words = _some(rng)
    names, verb = rng.sample(NAMES + OBJECTS, len(words)), rng.choice(("likes", "is in", "has"))
    facts = [f"{name} {verb} the {word} ." for name, word in zip(names, words, strict=True)]
    return _asked(rng, f"{names[0]} {verb} the ?", words, " ".join(rng.sample(facts, len(facts))))


def _order(rng: random.Random) -> str:
    """A question on order: which word is first or last of a list, or what comes after a day or a number."""
    words = _some(rng)
    if rng.random() < 0.5:
        listed = rng.sample(words, len(words))
        end = rng.choice(("first", "last"))
        if (listed[0] if end == "first" else listed[-1]) != words[0]:
            listed.remove(words[0])
            listed.insert(0 if end == "first" else len(listed), words[0])
        return _asked(rng, f"which comes {end} ?", words, " ".join(listed) + " .")
    row = rng.choice((DAYS, NUMBERS))
    place = rng.randrange(len(row) - 1)
    choices = [row[place + 1], *_others(rng, row, row[place + 1], len(words) - 1)]
    return _asked(rng, f"what comes after {row[place]} ?", choices)


def _some(rng: random.Random) -> list[str]:
    """Two to five words, the first of which will be the right answer."""
    return rng.sample(_mixed(rng), rng.randint(2, 5))


def _asked(rng: random.Random, text: str, words: Sequence[str], context: str = "") -> str:
    example = (letters if rng.random() < 0.8 else cloze)("", _question(rng, text, words[0], words[1:], context))
    return example.prompt + example.label


# The exercises of each level. A level is passed once nearly all of its letters are right.
LEVELS = (
    (_bare,),
    (_bare, _answered, _answered),
    (_answered, _picked, _picked, _pick),
    (_picked, _pick, _pick, _pick),
    (_picked, _pick, _pick, _look_up, _look_up, _look_up, _look_up, _order, _order, _count, _pairs),
)


def pretraining_text(rng: random.Random, level: int = len(LEVELS) - 1) -> str:
    """One document of the base's training text: an exercise of the given level, of a kind that no task asks.

    The exercises that lead up to a letter come one on top of the other. All at once none of them is learned in a
    thousand steps; one after the other they take four hundred.
    """
    return rng.choice(LEVELS[level])(rng)
