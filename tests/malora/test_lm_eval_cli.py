"""`malora-lm-eval` scores a saved adapter, as lm-eval scores PEFT's own."""

import json
import sys
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import malora
from bench.models import tiny
from malora import lm_eval_cli
from tests import processes

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"Question: {word}\nAnswer:", "choices": [" A", " B", " C"], "answer": answer}
    for answer, word in ((0, "red"), (1, "blue"), (2, "green"), (0, "one"), (1, "never scored"))
]
LIMIT = 4
TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folders(tmp_path):
    """A base, an adapter on it whose update is not zero, and a task."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, malora.METHODS["malora"](r=4, lora_alpha=8, d=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "malora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "task").mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "task" / "local_questions.yaml").write_text(TASK.format(data=data))
    return tmp_path


def likelihoods(folder, with_adapter: bool) -> list[list[float]]:
    """Return each choice's log-likelihood by a plain forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = PeftModel.from_pretrained(base, folder / "adapter").eval() if with_adapter else base

    def one(question: str, choice: str) -> float:
        prompt = tokenizer(question)["input_ids"]
        ids = tokenizer(question + choice)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))

    return [[one(q["question"], choice) for choice in q["choices"]] for q in QUESTIONS[:LIMIT]]


def test_lm_eval_scores_a_saved_adapter_on_a_local_task(folders):
    command = [
        *("run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={folders / 'base'},peft={folders / 'adapter'},dtype=float32"),
        *("--tasks", "local_questions", "--include_path", folders / "task", "--limit", LIMIT),
        *("--output_path", folders / "out", "--log_samples"),
    ]
    done = processes.run("malora.lm_eval_cli", *command, environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    (results,) = (folders / "out").rglob("results_*.json")
    (samples,) = (folders / "out").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    got = [[float(response[0][0]) for response in row["resps"]] for row in rows]
    expected, of_base = likelihoods(folders, True), likelihoods(folders, False)
    assert torch.tensor(got).allclose(torch.tensor(expected), atol=1e-4)
    assert (torch.tensor(expected) - torch.tensor(of_base)).abs().min() > 1e-2
    right = [max(range(3), key=row.__getitem__) == q["answer"] for row, q in zip(expected, QUESTIONS, strict=False)]
    score = json.loads(results.read_text())["results"]["local_questions"]["acc,none"]
    assert score == pytest.approx(sum(right) / LIMIT)


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="2"):
        lm_eval_cli.main()
    assert capsys.readouterr().err == "malora-lm-eval needs lm-eval: pip install 'lm-eval[hf]'.\n"
