"""The README and the site's pages: their words, code names, and programs."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.rglob("*.md")) if not path.name.startswith("2"))]
PACKAGES = ("bench", "malora", "tasks")


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
    assert len(program.splitlines()) <= 15 or page != "README.md"
    exec(program, {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_task_of_the_guide_reads_a_record():
    program = re.search(r"```python\n(.*?)```", (DOCS / "guides" / "add-a-task.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(program, names)
    record = {"question": "?", "correct_answer": "b", "distractor1": "a", "distractor2": "d", "distractor3": "c"}
    question = names["SCIQ"].parse_record(record)
    assert question.choices == ("a", "b", "c", "d") and question.choices[question.answer] == "b"
