"""Training data of the inter-domain mixtures: six domains.

The data are the paper's data sets or open stand-ins. The stand-in of a domain is the open share of the paper's own data
set, followed by the most similar open data sets. A domain has the same name and title in PAPER and in OPEN, so their
tables have the same columns.
"""

from __future__ import annotations

from dataclasses import replace

from tasks import instructions
from tasks.base import Domain
from tasks.e2e import E2E
from tasks.gsm8k import GSM8K
from tasks.medmcqa import MEDMCQA
from tasks.medqa import AFRIMEDQA, MEDQA_DEV, MEDQA_TEST

PAPER = (
    Domain("medicine", "medicine", (MEDMCQA,), ("medmcqa",)),
    Domain("code", "code", (instructions.MAGICODER,), ("humaneval",)),
    Domain("finance", "finance", (instructions.FINANCE_ALPACA,), ("phrasebank",)),
    Domain("mathematics", "mathematics", (instructions.METAMATH,), ("gsm8k",)),
    Domain("general", "general", (instructions.ALPACA_GPT4,), ("arc_challenge", "arc_easy")),
    Domain("data_to_text", "data to text", (E2E,), ("e2e",)),
)

_STAND_INS = {
    "medicine": (AFRIMEDQA, MEDQA_DEV, MEDQA_TEST, instructions.MEDICAL_MEADOW),
    "code": (instructions.CODE_EVOL, instructions.CODE_GPTEACHER, instructions.CODE_ALPACA, instructions.MBPP),
    "finance": (
        instructions.FINANCE_ALPACA_SUBSET,
        instructions.FIQA,
        instructions.FINANCIAL_QA,
        instructions.XBRL_TERMS,
    ),
    "mathematics": (GSM8K, instructions.SVAMP),
    "general": (instructions.ALPACA_GPT4_SUBSET, instructions.ALPACA_CLEANED),
    "data_to_text": (E2E,),
}
OPEN = tuple(replace(domain, training_sets=_STAND_INS[domain.name]) for domain in PAPER)
# The smallest domain, mathematics, has 10,549 items. Half as many from each domain are 3.7 million SmolLM2 tokens per
# epoch: three epochs and the generated answers take two minutes on a GPU. Tables 1, 3 and 11 need some 70 such runs.
MAX_OPEN_ITEMS = 5_000
