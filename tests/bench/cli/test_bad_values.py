"""Values that no option, description or YAML file may have: each is one line and exit code 2."""

import pytest

from bench.cli.parser import main
from bench.errors import UserError
from tasks.task_files import read_mixture


@pytest.mark.parametrize(
    "words",
    [
        ["table2", "--seeds", "9" * 5000],
        ["table2", "--seeds", "999999999"],
        ["table2", "--jobs", "9" * 20],
        ["run", "--seed", "9" * 25],
        ["run", "--seed", "9" * 5000],
        ["run", "--learning-rate", "1e300"],
        ["run", "--learning-rate", "nan"],
        ["run", "--model", "x" * 256],
        ["run", "--data", "x" * 5000],
        ["run", "--data", "a\0b"],
        ["run", "--task", "é" * 200 + ".jsonl"],
        ["run", "--mixture", "x" * 300 + ".toml"],
        ["run", "--results", "x/" * 3000],
        ["score", "--adapter", "x" * 256],
        ["export-task", "x" * 300 + ".jsonl"],
        ["export-task", "lexicon", "--output", "/proc/no"],
        ["run", "--set", "beta=NaN"],
        ["run", "--set", "beta=1e300"],
        ["run", "--set", "beta=null"],
        ["run", "--set", "r=1" + "0" * 400],
        ["run", "--set", "r=true"],
        ["run", "--set", "freeze=3"],
        ["run", "--set", "freeze=[[]]"],
        ["run", "--set", "rank_pattern=[1]"],
        ["run", "--set", 'rank_pattern={"q_proj": "8"}'],
        ["run", "--set", "target_modules=" + "[" * 3000],
        ["run", "--set", "lora_alpha=" + "9" * 5000],
        ["run", "--set", 'target_modules="\\ud800"'],
        ["run", "--method", "lora", "--set", "r=x"],
        ["run", "--method", "lora", "--set", "lora_alpha=[]"],
        ["run", "--method", "lora", "--set", "target_modules=("],
        ["run", "--method", "lora", "--set", "rank_pattern=7"],
        ["run", "--method", "lora", "--set", "layers_to_transform=x"],
    ],
    ids=lambda words: " ".join(words)[:50],
)
def test_one_line_and_exit_code_2(words, base_folder, tmp_path, capsys):
    if words[0] in ("run", "score", "table2"):
        words = [*words[:1], "--profile", "tiny", "--model", str(base_folder), "--results", str(tmp_path), *words[1:]]
        words += ["--max-steps", "1", "--max-items", "1"] if words[0] == "run" else []
    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 1500, error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "content", ["a: " + "[" * 5000, "!!int ''", "!!bool x", "!!timestamp x", "? [a]\n: b", "a: &a [*a]"]
)
def test_descriptions_that_break_yaml(content, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"a\.yaml"):
        read_mixture(tmp_path / "a.yaml")
