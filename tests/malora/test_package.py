"""The package from outside: its types for a user's type checker."""

import subprocess
import sys
from pathlib import Path

import pytest

from malora import METHODS

ROOT = Path(__file__).resolve().parent.parent.parent

RIGHT = """
import malora
from malora import MaloraConfig, make_config
from peft import LoraConfig

malora_config: MaloraConfig = malora.METHODS["malora"](r=8, lora_alpha=16, d=22, down="shared_subspace", freeze=["P"])
lora_config: LoraConfig = malora.METHODS["dora"](r=8, use_rslora=True)
for name in malora.METHODS:
    print(make_config(name, r=8).r)
"""


# Types of these libraries do not matter here, and reading them takes mypy a minute.
MYPY = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*,transformers.*,safetensors.*,numpy.*,triton.*,huggingface_hub.*,accelerate.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


def test_a_type_checker_finds_a_misspelt_option_of_every_method(tmp_path):
    pytest.importorskip("mypy")
    wrong = [f'malora.METHODS["{name}"](rnk=3)' for name in METHODS]
    wrong += ['malora.METHODS["mallora"]()', 'malora.METHODS["malora"](r="8")', 'malora.METHODS["malora"](down="P")']
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text("\n".join(["import malora", *wrong]))
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache"]
    command += [tmp_path / "right.py", tmp_path / "wrong.py"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    errors = {"right.py": [], "wrong.py": []}
    for line in output.splitlines():
        place, _, message = line.partition(": error: ")
        file, _, number = Path(place).name.partition(":")
        if message and file in errors:
            errors[file].append((int(number), message))
    assert errors["right.py"] == []
    assert [number for number, _ in errors["wrong.py"]] == list(range(2, len(wrong) + 2)), output
    messages = [message for _, message in errors["wrong.py"]]
    assert all('Unexpected keyword argument "rnk"' in message for message in messages[: len(METHODS)])
