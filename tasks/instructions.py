"""Instructions with written answers, to train on: the paper's sets, and what is open in their place."""

from __future__ import annotations

from collections.abc import Callable

from tasks.base import DataRef, Exercise, Task

Fields = tuple[str, ...]
ALPACA: tuple[Fields, str] = (("instruction", "input"), "output")


def reads(text: Fields, answer: str, context: str = "") -> Callable[[dict], Exercise | None]:
    """Of records with these fields; a record that lacks question or answer is left out."""

    def question(record: dict) -> Exercise | None:
        def clean(*names: str) -> str:
            return "\n".join(filter(None, ((record.get(name) or "").strip() for name in names))).replace("\r\n", "\n")

        if not (clean(*text[:1]) and clean(answer)):
            return None
        return Exercise(clean(*text), clean(answer), context=clean(context))

    return question


def _training(title: str, file: str, fields: tuple, *, hub: str = "", split: str = "train") -> Task:
    return Task(file, title, reads(*fields), DataRef(file, hub), {"train": split})


MAGICODER = _training(
    "Magicoder-OSS-Instruct", "magicoder_oss", (("problem",), "solution"), hub="ise-uiuc/Magicoder-OSS-Instruct-75K"
)
FINANCE_ALPACA = _training("Finance Alpaca", "finance_alpaca", ALPACA, hub="gbharti/finance-alpaca")
METAMATH = _training("MetaMathQA", "metamathqa", (("query",), "response"), hub="meta-math/MetaMathQA")
ALPACA_GPT4 = _training("Alpaca-GPT4", "alpaca_gpt4", ALPACA, hub="vicgalle/alpaca-gpt4")

MEDICAL_MEADOW = _training("Medical Meadow", "medical_meadow_small", ALPACA)
CODE_EVOL = _training("Evol-Instruct on Code Alpaca", "code_evol_instruct", ALPACA)
CODE_GPTEACHER = _training("GPTeacher Code-Instruct", "code_gpteacher_codegen", (*ALPACA[:1], "response"))
CODE_ALPACA = _training("Code Alpaca", "code_alpaca_2k", ALPACA)
MBPP = _training("MBPP", "mbpp", (("text",), "code"), split="all")
FINANCE_ALPACA_SUBSET = _training("Finance Alpaca, 1,000 rows", "finance_alpaca_subset", ALPACA)
FINANCIAL_QA = _training("Financial-QA-10k", "financial_qa_10k", (("question",), "answer", "context"))
XBRL_TERMS = _training("FinLoRA XBRL terms", "finlora_xbrl_term", (("context",), "target"))
FIQA = _training("FiQA", "fiqa_qa", (("question",), "answer"), split="test648")
SVAMP = _training("SVAMP with worked answers", "svamp_cot", (("question",), "answer_cot"))
ALPACA_GPT4_SUBSET = _training("Alpaca-GPT4, short answers", "alpaca_gpt4_nuggets_low", ALPACA)
ALPACA_CLEANED = _training("Alpaca, cleaned", "alpaca_cleaned", ALPACA)
