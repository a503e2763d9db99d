"""The procedural tasks of the tiny profile, and the vocabulary of its base model."""

import random
from collections import Counter

import pytest

from tasks import FORMATS, MIXTURES, TASKS, Generator, Task, build
from tasks.procedural import GENERATORS, VOCABULARY, pretraining_text


@pytest.mark.parametrize("name", GENERATORS)
def test_procedural_answers_cannot_be_guessed_from_their_position(name):
    """Check that every choice is correct about equally often.

    The bound is five standard errors in 3,000 draws.
    """
    rng = random.Random(0)
    drawn = [GENERATORS[name](rng) for _ in range(3000)]
    share = 1 / len(drawn[0].choices)
    for answer, count in Counter(q.answer for q in drawn).items():
        assert abs(count / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5, (answer, count)
    words = {w for q in drawn for w in FORMATS["letters"](name, q).prompt.split()}
    assert words <= set(VOCABULARY)


def test_the_tiny_base_never_reads_a_question_of_the_five_tasks():
    rng = random.Random(0)
    texts = [pretraining_text(rng) for _ in range(3000)]
    assert {w for text in texts for w in text.split()} <= set(VOCABULARY)
    for phrase in ("which kind is", "most often ?", "less than", "is second ?", "after spring"):
        assert not any(phrase in text for text in texts), phrase


def test_the_tiny_inter_domain_mixture_uses_words_that_its_base_knows():
    data = build(MIXTURES["procedural-inter"], Generator(), format="letters", seed=0)
    examples = [*data.train, *(e for items in (data.test | data.validation).values() for e in items)]
    assert {word for e in examples for word in (e.prompt + e.label).split()} <= set(VOCABULARY)
    written_tests = {name for name in data.test if isinstance(TASKS[name], Task) and TASKS[name].writing}
    assert written_tests == {"counting", "report"}
    assert all(e.label.split()[-1] == e.references[0] for e in data.test["counting"])
    assert all(e.label.strip() in e.references for e in data.test["report"])
