"""Texts to classify: nine data sets that a model of 135 million parameters can learn.

Labels are scored by the likelihood of their text. The sets are drawn as docs/notes/protocol-2026-12-01.md says: 1,000
test items and 500 for validation, with seed 0, where the published sets are not used as they are. Some licences allow
research only, so the files are not part of this repository; `file` names them, and docs/benchmark/classification.md
says where they are from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import one_of, require_filled, text
from tasks.intents import BANKING77, CLINC150
from tasks.splits import HeldOut, SplitRule

_USUAL = HeldOut(test=1000, validation=500)
_WITHOUT_VALIDATION = {"train": "train", "test": "test"}
_PUBLISHED = {"train": "train", "validation": "dev", "test": "test"}


def in_words(label: str) -> str:
    """Return a label as words in lower case: underscores become blanks, and joined capitals are split."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


def make_parser(label_name: str, labels: Sequence[str]) -> Callable[[Record], Question]:
    """Make a function that parses the text and the label of a record.

    Args:
        label_name: Name of the label in the prompt.
        labels: Labels as the publisher writes them, in the order of the choices.
    """
    choices = tuple(map(in_words, labels))

    def parse_record(record: Record) -> Question:
        words = require_filled("the text", text(record, "text")).strip()
        return Question(words, choices, one_of(record, "label", labels), label_name=label_name)

    return parse_record


def parse_clinc150(record: Record) -> Question:
    """Parse a record of CLINC150. Its choices are the intents of its domain."""
    domain = list(CLINC150)[one_of(record, "domain", list(CLINC150))]
    return _CLINC150_PARSERS[domain](record)


def parse_in_domain(domain: str) -> Callable[[Record], Question | None]:
    """Make a function that parses the records of one domain of CLINC150 and drops the others."""

    def parse_record(record: Record) -> Question | None:
        question = parse_clinc150(record)
        return question if record["domain"] == domain else None

    return parse_record


_CLINC150_PARSERS = {domain: make_parser("Intent", intents) for domain, intents in CLINC150.items()}
_TREC = ("abbreviation", "description", "entity", "human", "location", "number")
_AG_NEWS = ("world", "sports", "business", "science and technology")
_EMOTIONS = ("anger", "fear", "joy", "love", "sadness", "surprise")
_SNIPS = ("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
          "SearchScreeningEvent")  # fmt: skip
_STACKOVERFLOW = ("ajax", "apache", "bash", "cocoa", "drupal", "excel", "haskell", "hibernate", "linq", "magento",
                  "matlab", "oracle", "osx", "qt", "scala", "sharepoint", "spring", "svn", "visual-studio",
                  "wordpress")  # fmt: skip

# The hub has other splits of these sets, or hides the labels of the test. So they are read from files only.
SST2 = Task(
    "sst2",
    "SST-2",
    make_parser("Sentiment", ("negative", "positive")),
    DataRef("sst2", hub=""),
    _PUBLISHED,
    has_classes=True,
)
TREC = Task(
    "trec",
    "TREC",
    make_parser("Answer type", _TREC),
    DataRef("trec", hub=""),
    _WITHOUT_VALIDATION,
    held_out=_USUAL,  # 500 test questions are published
    has_classes=True,
)
SUBJ = Task(
    "subj",
    "SUBJ",
    make_parser("Style", ("objective", "subjective")),
    DataRef("subj", hub=""),
    {"train": "all", "validation": "all", "test": "all"},
    split_rule=SplitRule(validation=0.1, test=0.2),
    held_out=_USUAL,
    dropped_texts=(SST2, ("test", "dev")),  # both are from the same film reviews: 568 sentences of the test are in both
    has_classes=True,
)
AG_NEWS = Task(
    "ag_news",
    "AG News",
    make_parser("Topic", _AG_NEWS),
    DataRef("ag_news", hub=""),
    {"train": "test", "validation": "test", "test": "test"},  # the published training file is not among our data
    split_rule=SplitRule(validation=0.1, test=0.5),
    held_out=_USUAL,
    has_classes=True,
)
EMOTION = Task(
    "emotion",
    "emotion",
    make_parser("Emotion", _EMOTIONS),
    DataRef("emotion", hub=""),
    _PUBLISHED,
    held_out=HeldOut(test=2000, validation=500),
    drops_repeats=True,
    has_classes=True,
)
SNIPS = Task(
    "snips",
    "SNIPS",
    make_parser("Intent", _SNIPS),
    DataRef("snips", hub=""),
    _PUBLISHED,
    held_out=_USUAL,  # 700 test texts are published
    has_classes=True,
)
STACKOVERFLOW = Task(
    "stackoverflow",
    "StackOverflow",
    make_parser("Tag", _STACKOVERFLOW),
    DataRef("stackoverflow", hub=""),
    _PUBLISHED,
    held_out=_USUAL,
    has_classes=True,
)
BANKING = Task(
    "banking77",
    "BANKING77",
    make_parser("Intent", BANKING77),
    DataRef("banking77", hub=""),
    _WITHOUT_VALIDATION,
    held_out=_USUAL,
    has_classes=True,
)
CLINC = Task(
    "clinc150",
    "CLINC150",
    parse_clinc150,
    DataRef("clinc150", hub=""),
    _PUBLISHED,
    held_out=_USUAL,
    has_classes=True,
)
CLASSIFICATION = (SST2, TREC, SUBJ, AG_NEWS, EMOTION, SNIPS, STACKOVERFLOW, BANKING, CLINC)

# Of a domain's 2,250 texts 1,000 are trained on, so few remain to test.
_DOMAIN_SIZES = HeldOut(test=900, validation=250)
CLINC_DOMAINS = {
    domain: Task(
        f"clinc_{domain}",
        f"CLINC {in_words(domain)}",
        parse_in_domain(domain),
        DataRef("clinc150", hub=""),
        _PUBLISHED,
        held_out=_DOMAIN_SIZES,
        has_classes=True,
    )
    for domain in CLINC150
}
