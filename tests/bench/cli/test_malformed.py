"""Malformed input by chance: each ends in a valid result, or in one line and exit code 2.

`MALORA_MALFORMED` is the number of inputs of all tests together: 2,000 by default, 20,000 with `make test-malformed`.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from bench.cli.parser import main, make_parser
from bench.errors import UserError
from bench.experiments.methods import method_options
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.models.adapters import add_adapter, load_adapter
from bench.models.base import load, prepare
from bench.records import store
from bench.records.speed_schema import SpeedRecord
from bench.report.scores.experiment_page import experiment_page
from bench.report.scores.selection import records_frame, select
from bench.report.speed import tables
from malora import METHODS
from tasks import TASKS, Folder, Task
from tasks.task_files import read_mixture, read_task
from tests.bench.records.test_store import make
from tests.bench.report.speed.speed_records import make_speed
from tests.tasks.test_datasets import RECORDS

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes malformed input")
st = hypothesis.strategies

TOTAL = int(os.environ.get("MALORA_MALFORMED", "2000"))


MAX_CPU_SECONDS = 10.0  # for an input; the wall clock would count what else the machine does


def examples(share: float):
    """Return a decorator for a test that makes this share of all inputs, the same in each session."""
    health = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    settings = hypothesis.settings(
        max_examples=max(1, int(share * TOTAL)), deadline=None, database=None, derandomize=TOTAL <= 2000,
        suppress_health_check=health, phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )  # fmt: skip

    def decorate(test):
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def timed(*arguments, **options):
            start = time.process_time()
            inner(*arguments, **options)
            assert time.process_time() - start < MAX_CPU_SECONDS

        test.hypothesis.inner_test = timed
        return settings(test)

    return decorate


ODD_NUMBERS = [0, -1, 2**63, 10**25, 1e300, -1e300, 1e-320, float("nan"), float("inf"), True]
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "..",
    "(",
    "[a",
    "*",
    "x" * 256,
    "é" * 200,
    "9" * 30,
    "9" * 5000,
    "1e300",
    "nan",
    "[" * 2000,
]
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ODD_NUMBERS) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=4
)


PARSER = make_parser()  # making one takes longer than parsing a line


def commands():
    return PARSER._subparsers._group_actions[0].choices


OPTIONS = sorted(
    {option for command in commands().values() for option in command._option_string_actions} - {"-h", "--help"}
)
GOOD = ["0", "1", "malora", "lora,malora", "intra", "inter/code", "tiny", "cloze", "beta=2", "rank_pattern={}", "."]


@examples(0.25)
@hypothesis.given(
    st.sampled_from(sorted(commands())) | texts,
    st.lists(
        st.tuples(st.sampled_from(OPTIONS), st.none() | st.sampled_from(GOOD) | texts | values.map(repr)), max_size=4
    ),
)
def test_command_lines(command, options):
    words = [command, *(word for option, value in options for word in ([option] if value is None else [option, value]))]
    try:
        parsed = PARSER.parse_args(words)
    except SystemExit as exit:
        assert exit.code == 2
    else:
        assert callable(parsed.command)


@examples(0.25)
@hypothesis.given(st.sampled_from(sorted(METHODS)), st.data())
def test_options_of_methods(method, data):
    names = sorted(vars(METHODS[method]()))
    changes = data.draw(
        st.dictionaries(st.sampled_from(names), values | st.sampled_from(["A_t", "P_t S", "dense"]), max_size=2)
    )
    try:
        options = method_options(method, PROFILES["tiny"], "intra", changes)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert set(changes) <= set(options)


TASKS_OF_FILES = sorted(name for name in RECORDS if isinstance(TASKS.get(name), Task))


@examples(0.3)
@hypothesis.given(st.sampled_from(TASKS_OF_FILES), st.data())
def test_lines_of_data(name, data):
    """Change a field of a record, or any bytes of the file."""
    record = copy.deepcopy(RECORDS[name])
    field = data.draw(st.sampled_from(sorted(record)) | texts)
    record[field] = data.draw(values)
    line = json.dumps(record).encode()
    content = gzip.compress(line, mtime=0)
    damage = data.draw(st.sampled_from(["none", "none", "line", "file", "cut"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if damage == "line":
        line = line[:place] + data.draw(st.binary(max_size=4)) + line[place + 1 :]
        content = gzip.compress(line, mtime=0)
    elif damage == "file":
        content = content[:place] + data.draw(st.binary(min_size=1, max_size=2)) + content[place + 1 :]
    elif damage == "cut":
        content = content[:place]
    task, folder = TASKS[name], Path(test_lines_of_data.folder)
    published = task.published["test"]
    (folder / f"{task.data.file}_{published}.jsonl.gz").write_bytes(content)
    try:
        assert task.read(Folder(folder), "test")
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory):
    test_lines_of_data.folder = tmp_path_factory.mktemp("data")


SETTINGS = ["name", "title", "data", "fields", "split", "metric", "max_new_tokens", "stop", "tasks", "blend", "size"]


@examples(0.1)
@hypothesis.given(
    st.dictionaries(st.sampled_from(SETTINGS), values, max_size=4), st.sampled_from(["toml", "yaml"]), texts
)
def test_descriptions(settings, kind, more):
    folder = Path(test_lines_of_data.folder)
    path = folder / f"mine.{kind}"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    path.write_bytes(
        ("\n".join(lines) if kind == "toml" else json.dumps(settings)).encode() + more.encode(errors="replace")
    )
    for read in (read_task, read_mixture):
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """An adapter's folder, its config, and a function that loads its base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = prepare(str(base_folder))
    model = load(base, torch.device("cpu"))[0]
    adapted = add_adapter(copy.deepcopy(model), "malora", {}, seed=0)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, json.loads((folder / "adapter_config.json").read_text()), lambda: copy.deepcopy(model), base


@examples(0.04)
@hypothesis.given(st.data())
def test_adapter_folders(adapter, data):
    folder, config, model, base = adapter
    name = data.draw(st.sampled_from(sorted(config)))
    (folder / "adapter_config.json").write_text(json.dumps(config | {name: data.draw(values)}))
    try:
        load_adapter(model(), base, folder)
    except UserError as error:
        assert "\n" not in str(error)


def change_a_value(data, content):
    """Replace or remove a value of nested objects and lists, in place."""
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inside = place[key]
        if not (isinstance(inside, dict | list) and inside and data.draw(st.integers(0, 4))):
            break
        place = inside
    if data.draw(st.integers(0, 5)):
        place[key] = data.draw(values)
    else:
        del place[key]


@examples(0.03)
@hypothesis.given(st.data())
def test_records_of_runs(data):
    """Change a record whose hash is left out, as in older ones, or its items file."""
    folder = Path(test_lines_of_data.folder) / "records"
    shutil.rmtree(folder, ignore_errors=True)
    path = store.write(make(), folder)
    items = path.with_name(f"{path.stem}.items.csv.gz")
    if data.draw(st.booleans()):
        content = json.loads(path.read_text())
        del content["content_sha256"]
        change_a_value(data, content)
        path.write_text(json.dumps(content))
    else:
        damaged = bytearray(items.read_bytes())
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        items.write_bytes(damaged)
    try:
        records = store.read_all(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        experiment = EXPERIMENTS["table2"]
        assert experiment_page(select(experiment, "tiny", records_frame(records)))


@examples(0.025)
@hypothesis.given(st.data())
def test_records_of_speed(data):
    folder = Path(test_lines_of_data.folder) / "speed"
    shutil.rmtree(folder, ignore_errors=True)
    path = store.write_speed(make_speed(), folder)
    content = json.loads(path.read_text())
    change_a_value(data, content)
    with contextlib.suppress(ValueError, TypeError):  # a record that can be read needs the name that follows from it
        fields = {name: value for name, value in content.items() if name != "schema"}
        path = path.rename(path.with_name(f"{SpeedRecord.model_validate(fields).id}.json"))
    path.write_text(json.dumps(content))
    try:
        records = store.read_speed(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tables.pages(records)


@examples(0.005)
@hypothesis.given(st.data())
def test_base_models(base_folder, data):
    """Train and score on a base whose config or tokenizer has another value."""
    folder = Path(test_lines_of_data.folder) / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base_folder, folder / "model")
    path = folder / "model" / data.draw(st.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json"]))
    content = json.loads(path.read_text())
    change_a_value(data, content)
    path.write_text(json.dumps(content))
    prepare.cache_clear()
    options = ["--model", folder / "model", "--max-steps", 1, "--max-items", 1, "--results", folder / "results"]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in ("run", "--method", "lora", "--profile", "tiny", *options)])
    assert code in (0, 2), errors.getvalue()
    assert (code == 0) == bool(list(folder.glob("results/runs/*.json")))
    assert "Traceback" not in errors.getvalue()
