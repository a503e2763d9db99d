"""What the inter-domain mixtures are trained on: six domains, as in the paper from the hub, and from open stand-ins.

What is in a domain's stand-in is the paper's own set as far as it is open, then what is nearest to it in kind. A domain
has one name and one title in both, so that their tables have the same columns.
"""

from __future__ import annotations

from dataclasses import replace

from tasks.base import Domain
from tasks.e2e import E2E
from tasks.gsm8k import GSM8K
from tasks.instructions import (
    ALPACA_CLEANED,
    ALPACA_GPT4,
    ALPACA_GPT4_SUBSET,
    CODE_ALPACA,
    CODE_EVOL,
    CODE_GPTEACHER,
    FINANCE_ALPACA,
    FINANCE_ALPACA_SUBSET,
    FINANCIAL_QA,
    FIQA,
    MAGICODER,
    MBPP,
    MEDICAL_MEADOW,
    METAMATH,
    SVAMP,
    XBRL_TERMS,
)
from tasks.medmcqa import MEDMCQA
from tasks.medqa import AFRIMEDQA, MEDQA_DEV, MEDQA_TEST

PAPER = (
    Domain("medicine", "medicine", (MEDMCQA,), ("medmcqa",)),
    Domain("code", "code", (MAGICODER,), ("humaneval",)),
    Domain("finance", "finance", (FINANCE_ALPACA,), ("phrasebank",)),
    Domain("mathematics", "mathematics", (METAMATH,), ("gsm8k",)),
    Domain("general", "general", (ALPACA_GPT4,), ("arc_challenge", "arc_easy")),
    Domain("data_to_text", "data to text", (E2E,), ("e2e",)),
)

_STAND_INS = {
    "medicine": (AFRIMEDQA, MEDQA_DEV, MEDQA_TEST, MEDICAL_MEADOW),
    "code": (CODE_EVOL, CODE_GPTEACHER, CODE_ALPACA, MBPP),
    "finance": (FINANCE_ALPACA_SUBSET, FIQA, FINANCIAL_QA, XBRL_TERMS),
    "mathematics": (GSM8K, SVAMP),
    "general": (ALPACA_GPT4_SUBSET, ALPACA_CLEANED),
    "data_to_text": (E2E,),
}
OPEN = tuple(replace(domain, parts=_STAND_INS[domain.name]) for domain in PAPER)
# The smallest domain, mathematics, has 10,549 items, of which validation and what stands in a test are taken.
OPEN_SIZE = 10_000
