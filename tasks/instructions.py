"""Instruction data sets for training.

They are the paper's own, and open data sets in their place.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.base import DataRef, Exercise, Record, Task
from tasks.fields import optional_text
from tasks.fields import text as required_text

FieldNames = tuple[str, ...]
ALPACA: tuple[FieldNames, str] = (("instruction", "input"), "output")


def make_parser(text: FieldNames, answer: str, context: str = "") -> Callable[[Record], Exercise | None]:
    """Make a function that parses records with these fields.

    It drops records whose question or answer is empty.

    Args:
        text: Names of the fields with the instruction; only the first one is required.
        answer: Name of the field with the answer.
        context: Name of the field with a text to read first, or "".
    """

    def parse_record(record: Record) -> Exercise | None:
        question, solution = _clean(required_text(record, text[0])), _clean(required_text(record, answer))
        if not (question and solution):
            return None
        inputs = filter(None, (_clean(optional_text(record, name)) for name in text[1:]))
        passage = _clean(required_text(record, context)) if context else ""
        return Exercise("\n".join((question, *inputs)), solution, context=passage)

    return parse_record


def _clean(text: str) -> str:
    return text.strip().replace("\r\n", "\n")


def _make_task(
    title: str, file: str, text: FieldNames, answer: str, *, context: str = "", hub: str = "", split: str = "train"
) -> Task:
    return Task(file, title, make_parser(text, answer, context), DataRef(file, hub), {"train": split})


MAGICODER = _make_task(
    "Magicoder-OSS-Instruct", "magicoder_oss", ("problem",), "solution", hub="ise-uiuc/Magicoder-OSS-Instruct-75K"
)
FINANCE_ALPACA = _make_task("Finance Alpaca", "finance_alpaca", *ALPACA, hub="gbharti/finance-alpaca")
METAMATH = _make_task("MetaMathQA", "metamathqa", ("query",), "response", hub="meta-math/MetaMathQA")
ALPACA_GPT4 = _make_task("Alpaca-GPT4", "alpaca_gpt4", *ALPACA, hub="vicgalle/alpaca-gpt4")

MEDICAL_MEADOW = _make_task("Medical Meadow", "medical_meadow_small", *ALPACA)
CODE_EVOL = _make_task("Evol-Instruct on Code Alpaca", "code_evol_instruct", *ALPACA)
CODE_GPTEACHER = _make_task("GPTeacher Code-Instruct", "code_gpteacher_codegen", ALPACA[0], "response")
CODE_ALPACA = _make_task("Code Alpaca", "code_alpaca_2k", *ALPACA)
MBPP = _make_task("MBPP", "mbpp", ("text",), "code", split="all")
FINANCE_ALPACA_SUBSET = _make_task("Finance Alpaca, 1,000 rows", "finance_alpaca_subset", *ALPACA)
FINANCIAL_QA = _make_task("Financial-QA-10k", "financial_qa_10k", ("question",), "answer", context="context")
XBRL_TERMS = _make_task("FinLoRA XBRL terms", "finlora_xbrl_term", ("context",), "target")
FIQA = _make_task("FiQA", "fiqa_qa", ("question",), "answer", split="test648")
SVAMP = _make_task("SVAMP with worked answers", "svamp_cot", ("question",), "answer_cot")
ALPACA_GPT4_SUBSET = _make_task("Alpaca-GPT4, short answers", "alpaca_gpt4_nuggets_low", *ALPACA)
ALPACA_CLEANED = _make_task("Alpaca, cleaned", "alpaca_cleaned", *ALPACA)
