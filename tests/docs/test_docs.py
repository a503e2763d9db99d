"""The README and the site's pages: their words, code names, and programs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.cli.parser import main, make_parser
from tasks import TASKS, Folder, Mixture, build
from tests import inter_folder
from tests.own_task_files import write

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.rglob("*.md")) if not path.name.startswith("2"))]
PACKAGES = ("bench", "malora", "tasks")
GUIDE = DOCS / "guides" / "add-a-task.md"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain_english = _load("plain_english")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_is_in_plain_english(page):
    assert plain_english.problems(page.read_text()) == []


def test_the_readme_is_short():
    assert plain_english.readme_problems((ROOT / "README.md").read_text()) == []


def test_banned_words_are_found():
    code = "```\nbeside = 1\n```\n`beside` [a](beside)"
    text = f"Weights lie beside x.\n\n{code}\n<!-- table2 small -->\nbeside\n<!-- end -->\n"
    assert [problem.partition(";")[0] for problem in plain_english.problems(text)] == ["line 1: 'beside'"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_of_code_exist(page):
    text = page.read_text()
    names = re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)[`(\[]", text)
    names += re.findall(r"^::: (\S+)", text, re.MULTILINE)
    paths = re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w/.]*)`", text)
    assert [name for name in names if not _exists(name)] == []
    assert [path for path in paths if not (ROOT / path).exists()] == (["tasks/sciq.py"] * ("sciq" in text))


def _exists(name: str) -> bool:
    """Return whether a dotted name is a module, or is defined or imported in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            return len(parts) == end or parts[end] in _defined(file)
    return False


def _defined(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List()):
                names |= set(ast.literal_eval(node.value))  # some are imported on demand
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_program_to_paste_trains_and_saves(page, tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    ids = torch.arange(8)[None]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: AutoModelForCausalLM.from_config(config))
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda name: lambda text, return_tensors: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    )
    program = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    assert len(list(filter(None, program.splitlines()))) <= 20 or page != "README.md"
    exec(program, {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_task_of_the_guide_reads_a_record():
    program = re.search(r"```python\n(.*?)```", (DOCS / "guides" / "add-a-task.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(program, names)
    record = {"question": "?", "correct_answer": "b", "distractor1": "a", "distractor2": "d", "distractor3": "c"}
    question = names["SCIQ"].parse_record(record)
    assert question.choices == ("a", "b", "c", "d") and question.choices[question.answer] == "b"


def test_the_task_of_the_guide_reads_the_files_that_it_names(tmp_path, registry):
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1], names)
    record = {"question": "?", "correct_answer": "b", "distractor1": "a", "distractor2": "d", "distractor3": "c"}
    for split in ("train", "validation", "test"):
        inter_folder.write(tmp_path, f"sciq_{split}", [{**record, "question": f"{split} {i}"} for i in range(5)])
    TASKS["sciq"] = names["SCIQ"]
    for mixture in _blocks("python"):
        if mixture.startswith("Mixture("):
            science = replace(eval(mixture, {"Mixture": Mixture}), tasks=("sciq",))
    data = build(science, Folder(tmp_path), format="cloze", seed=0)
    assert len(data.train) == len(data.test["sciq"]) == 5 and data.test["sciq"][0].label == " b"


def test_the_files_of_the_guide_are_tasks_and_a_mixture(tmp_path, monkeypatch, registry, base_folder):
    """Write the guide's files, with more records of their form, and run its commands in miniature."""
    monkeypatch.chdir(tmp_path)
    questions, prompts = ([json.loads(line) for line in block.splitlines()] for block in _blocks("json"))
    (description,), (mixture,) = _blocks("toml"), _blocks("yaml")
    write(tmp_path / "weather.jsonl", _more(questions, "question"))
    write(tmp_path / "describe.jsonl", _more(prompts, "prompt"))
    (tmp_path / "weather.toml").write_text(description)
    (tmp_path / "science.yaml").write_text(mixture.replace("arc_easy", "majority"))
    short = [
        "--model",
        str(base_folder),
        "--profile",
        "tiny",
        "--max-steps",
        "1",
        "--max-items",
        "1",
        "--results",
        "records",
    ]
    for arguments in ("--task weather.jsonl", "--task describe.jsonl", "--task weather.toml", "--mixture science.yaml"):
        registry()
        assert main(["run", *arguments.split(), *short]) == 0
    commands = [line for block in _blocks("bash") for line in block.splitlines()]
    for command in commands:
        if command.startswith("python -m bench run"):
            make_parser().parse_args(shlex.split(command.replace("--mixture science ", ""), comments=True)[3:])
    registry()
    (export,) = (command for command in commands if "export-task" in command)
    assert main(shlex.split(export)[3:]) == 0 and (tmp_path / "lm_eval_tasks" / "weather.yaml").is_file()


def _blocks(language: str) -> list[str]:
    """Return the guide's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def _more(records: list[dict], field: str) -> list[dict]:
    return [{**record, field: f"{record[field]} {i}"} for i in range(20) for record in records]
