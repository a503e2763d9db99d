"""Financial PhraseBank: the sentiment of sentences of financial news.

The data set is published in arXiv 1307.5336.
The paper uses the 3,453 sentences on which at least three quarters of the annotators agree.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import one_of, require_filled, text

SENTIMENTS = ("positive", "neutral", "negative")


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder."""
    question = "Is this news positive, neutral or negative for an investor?"
    sentence = require_filled("the sentence", text(record, "sentence")).strip()
    return Question(question, SENTIMENTS, one_of(record, "label", SENTIMENTS), context=sentence)


PHRASEBANK = Task(
    "phrasebank",
    "PhraseBank",
    parse_record,
    DataRef("financial_phrasebank", "takala/financial_phrasebank", "sentences_75agree", {"75agree": "train"}),
    {"test": "75agree"},
    has_classes=True,
)
