"""Financial PhraseBank: what a sentence of financial news means to an investor (arXiv 1307.5336).

The paper's 3,453 sentences are those on which at least three quarters of the annotators agree.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Task

SENTIMENTS = ("positive", "neutral", "negative")


def question(record: dict) -> Question:
    asked = "Is this news positive, neutral or negative for an investor?"
    return Question(asked, SENTIMENTS, SENTIMENTS.index(record["label"]), context=record["sentence"].strip())


PHRASEBANK = Task(
    "phrasebank",
    "PhraseBank",
    question,
    DataRef("financial_phrasebank", "takala/financial_phrasebank", "sentences_75agree", {"75agree": "train"}),
    {"test": "75agree"},
)
