"""What the inter-domain mixtures are trained on: six domains, as in the paper from the hub, and from open stand-ins.

What is in a domain's stand-in is the paper's own set as far as it is open, then what is nearest to it in kind. A domain
has one name and one title in both, so that their tables have the same columns.
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
OPEN = tuple(replace(domain, parts=_STAND_INS[domain.name]) for domain in PAPER)
# The smallest domain, mathematics, has 10,549 items. Half of that from each is 3.7 million tokens of SmolLM2 an epoch,
# so that three epochs and the answers are two minutes of a GPU: Tables 1, 3 and 11 are some seventy runs.
OPEN_SIZE = 5_000
