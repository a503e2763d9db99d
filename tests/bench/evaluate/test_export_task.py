"""Exported tasks in lm-eval itself, from another folder and without this repository."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bench.errors import UserError
from bench.evaluate.export_task import export_task
from bench.evaluate.lm_eval_tasks import quiet_lm_eval
from bench.evaluate.score import score
from bench.models.base import load, prepare
from tasks import TASKS, Task
from tasks.build import build_task
from tasks.registry import add_task
from tests import inter_folder, processes
from tests.bench.conftest import SOURCE
from tests.own_task_files import prompts, questions, write


def task_of(name: str) -> Task:
    task = TASKS[name]
    assert isinstance(task, Task)
    return task


def evaluate(folder: Path, tasks: list[str], model, tokenizer, **options):
    """Return lm-eval's results of exported tasks."""
    with quiet_lm_eval(), torch.no_grad():
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=1,
            **options,
        )


def outcomes_of(results, task: str, metric: str) -> list[float]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [float(sample[metric]) for sample in samples]


def test_lm_eval_scores_exported_tasks_as_bench_does(base_folder, tmp_path, registry):
    add_task(write(tmp_path / "places.jsonl", questions()))
    names = ["places", "majority", "counting"]
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    for name in names:
        export_task(task_of(name), SOURCE, "letters", tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    tests = {name: build_task(task_of(name), SOURCE, format="letters")["test"] for name in names}
    _, ours, _ = score(model, tokenizer, tests, format="letters", batch_size=4)
    theirs = evaluate(tmp_path / "moved", names, model, tokenizer)
    for name, metric in (("places", "acc"), ("majority", "acc"), ("counting", "exact_match")):
        assert outcomes_of(theirs, name, metric) == ours[name], name
        assert theirs["results"][name][f"{metric},none"] == pytest.approx(sum(ours[name]) / len(ours[name]))


def test_written_answers_are_graded_against_all_references(base_folder, tmp_path, registry, monkeypatch):
    add_task(write(tmp_path / "say.jsonl", prompts()))
    path = export_task(task_of("say"), SOURCE, "letters", tmp_path / "out")
    config = yaml.safe_load(path.read_text().replace("!function ", ""))
    assert config["generation_kwargs"] == {
        "until": ["\nQuestion:", "\nPassage:"],
        "max_gen_toks": 64,
        "do_sample": False,
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "say_test.jsonl").read_text().splitlines()]
    answers = iter([rows[0]["references"][1], "nothing", *[row["answer"] for row in rows[2:]]])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(answers) for _ in requests])
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    results = evaluate(tmp_path / "out", ["say"], model, tokenizer)
    assert outcomes_of(results, "say", "rougeL") == [1, 0, *[1] * (len(rows) - 2)]


def test_choices_are_continuations_and_examples_come_from_train(base_folder, tmp_path, registry):
    add_task(write(tmp_path / "places.jsonl", questions()))
    path = export_task(task_of("places"), SOURCE, "cloze", tmp_path / "out")
    assert "metric: acc_norm" in path.read_text()
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    results = evaluate(tmp_path / "out", ["places"], model, tokenizer, num_fewshot=1, limit=3)
    train = (tmp_path / "out" / "places_train.jsonl").read_text()
    for sample in results["samples"]["places"]:
        prompt, choice = sample["arguments"][0]
        assert choice == f" {sample['doc']['choices'][0]}"
        shot, _, question = prompt.partition("\n\n")
        assert question == sample["doc"]["prompt"] and json.dumps(shot.rpartition(" ")[0])[1:-1] in train


def test_a_task_without_training_data_exports_its_test(tmp_path):
    from tasks import Folder

    (tmp_path / "data").mkdir()
    inter_folder.make(tmp_path / "data")
    path = export_task(task_of("phrasebank"), Folder(tmp_path / "data"), "letters", tmp_path / "out")
    assert (
        "train" not in path.read_text()
        and len((tmp_path / "out" / "phrasebank_test.jsonl").read_text().splitlines()) == 12
    )
    with pytest.raises(UserError, match="humaneval runs programs in the sandbox"):
        export_task(task_of("humaneval"), Folder(tmp_path / "data"), "letters", tmp_path / "out")


def test_the_command_line_of_lm_eval_reads_the_folder(base_folder, tmp_path, registry):
    """Run `lm_eval` in a process that cannot import this repository."""
    add_task(write(tmp_path / "places.jsonl", questions()))
    export_task(task_of("places"), SOURCE, "letters", tmp_path / "out")
    done = processes.run(
        "lm_eval",
        *("run", "--model", "hf", "--tasks", "places", "--limit", "2"),
        *("--include_path", tmp_path / "out", "--output_path", tmp_path / "results"),
        *("--model_args", f"pretrained={base_folder}", "--device", "cpu"),
        folder=tmp_path,
        environment={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        absent=("bench", "malora", "tasks", "tests"),
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(path.read_text())["n-samples"]["places"]["effective"] == 2
