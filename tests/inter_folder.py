"""A small data folder for the `inter-open` mixture.

It has every file that the mixture reads, with the publisher's fields.
"""

import gzip
import json
from pathlib import Path

ARC = {"id": "x", "question": "Which is hot?", "choices": ["ice", "fire", "snow"], "answer": 1, "answerKey": "B"}
MEDMCQA = {"question": "Which is hot?", "opa": "ice", "opb": "fire", "opc": "snow", "opd": "rain", "cop": 2,
           "choice_type": "single"}  # fmt: skip
GSM8K = {"question": "How many legs have 500 cats?", "answer": "500*4 = <<500*4=2000>>2,000 legs.\n#### 2,000"}
E2E = {"mr": "name[The Mill], food[Thai]", "ref": "The Mill serves Thai food."}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": '\n\ndef double(n):\n    """Twice n."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}
ALPACA = {"instruction": "Say it.", "input": "it", "output": "it"}
OPTIONS = {"A": "ice", "B": "fire"}


def write(folder: Path, file: str, records: list[dict]) -> None:
    """Write records to a gzipped JSON Lines file."""
    with gzip.open(folder / f"{file}.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def make(folder: Path, count: int = 12) -> None:
    """Write every file with `count` records, each with a different question."""

    def numbered(record: dict, field: str) -> list[dict]:
        return [{**record, field: f"{record[field]} {i}"} for i in range(count)]

    files = {
        "afrimedqa_mcq": numbered({"question": "Hot?", "options": OPTIONS, "answer": "B"}, "question"),
        "medqa_us_dev": numbered({"question": "Warm?", "options": ["A. ice", "B. fire"], "answer": "fire"}, "question"),
        "medqa_us_test": numbered({"question": "Cold?", "options": OPTIONS, "answer": "ice"}, "question"),
        "mbpp_all": numbered({"text": "Write it.", "code": "def it():\r\n\tpass"}, "text"),
        "code_gpteacher_codegen_train": numbered({"instruction": "Code", "input": "", "response": "it"}, "instruction"),
        "financial_qa_10k_train": numbered({"question": "Gain?", "answer": "1", "context": "We gained 1."}, "question"),
        "finlora_xbrl_term_train": numbered({"context": "Explain X.", "target": "X is x."}, "context"),
        "fiqa_qa_test648": numbered({"question": "Buy?", "answer": "No."}, "question"),
        "gsm8k_train": numbered({**GSM8K, "question": "Cats?"}, "question"),
        "svamp_cot_train": numbered({"question": "Dogs?", "answer_cot": "The answer is <4>."}, "question"),
        "e2e_nlg_train": numbered({**E2E, "mr": "food[Thai]"}, "mr"),
        "e2e_nlg_test": [*numbered(E2E, "mr"), {**E2E, "mr": "name[The Mill], food[Thai] 0", "ref": "Thai!"}],
        "gsm8k_test": numbered(GSM8K, "question"),
        "medmcqa_dev": numbered(MEDMCQA, "question"),
        "humaneval_test": [HUMANEVAL],
        "financial_phrasebank_75agree": numbered({"sentence": "Sales rose .", "label": "positive"}, "sentence"),
        "arc_challenge_test": numbered({**ARC, "question": "Which?"}, "question"),
        "arc_easy_test": numbered(ARC, "question"),
    }
    for file in ("medical_meadow_small", "code_evol_instruct", "code_alpaca_2k", "finance_alpaca_subset",
                 "alpaca_gpt4_nuggets_low", "alpaca_cleaned"):  # fmt: skip
        files[f"{file}_train"] = numbered({**ALPACA, "instruction": file}, "instruction")
    for file, records in files.items():
        write(folder, file, records)
