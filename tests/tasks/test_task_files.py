"""Tasks without code: their items, their splits, and the errors of their files."""

import gzip
import json

import pytest

from tasks import MIXTURES, TASKS, DataError, Generator, Question, Task, build
from tasks.base import DataRef, Exercise, Writing
from tasks.metrics import LAST_NUMBER, LIKELIHOOD, ROUGE_L
from tasks.registry import add_mixture, add_task, add_to_mixture
from tasks.splits import SplitRule
from tasks.task_files import RecordFiles, read_task
from tests.own_task_files import prompts, questions, write

NO_SOURCE = RecordFiles({})


def items_of(task):
    return [item for items in task.load(NO_SOURCE).values() for item in items]


def test_a_data_file_is_a_task(tmp_path):
    task = read_task(write(tmp_path / "places.jsonl", questions(300)))
    assert (task.name, task.title, task.writing, task.split_rule) == ("places", "places", None, SplitRule())
    splits = task.load(NO_SOURCE)
    assert {split: len(items) > 10 for split, items in splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), True
    )
    assert sum(map(len, splits.values())) == 300 and 160 < len(splits["train"]) < 260
    keys = [{item.key for item in items} for items in splits.values()]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    first = questions(300)[0]
    right = first["choices"].index(first["answer"])
    expected = Question(first["question"], tuple(first["choices"]), right, first["context"])
    assert expected in items_of(task)


def test_splits_do_not_depend_on_the_order_of_the_file(tmp_path):
    records = questions(100)
    one = read_task(write(tmp_path / "a.jsonl", records))
    other = read_task(write(tmp_path / "b.jsonl", records[::-1]))
    longer = read_task(write(tmp_path / "c.jsonl", [*questions(200)[100:], *records]))
    for split, items in one.load(NO_SOURCE).items():
        assert items == other.load(NO_SOURCE)[split][::-1]
        assert set(items) <= set(longer.load(NO_SOURCE)[split])
    assert one.fingerprint != other.fingerprint


def test_an_answer_is_a_choice_or_its_number(tmp_path):
    record = {"question": "q", "choices": ["2", "1", "0"]}
    records = [record | {"question": f"q {i}", "answer": (1, 1.0, "1")[i % 3]} for i in range(60)]
    assert {item.answer for item in items_of(read_task(write(tmp_path / "a.jsonl", records)))} == {1}


def test_prompts_are_answered_in_writing(tmp_path):
    task = read_task(write(tmp_path / "say.jsonl", prompts()))
    assert task.writing == Writing(ROUGE_L, 64)
    first = prompts()[0]
    assert Exercise(first["prompt"], first["answer"], tuple(first["references"])) in items_of(task)
    without = [{name: record[name] for name in ("prompt", "answer")} for record in prompts()]
    alone = read_task(write(tmp_path / "alone.jsonl", without))
    assert all(item.references == (item.answer,) for item in items_of(alone))


TOML = """
name = "sums"
title = "Sums"
data = "numbers.jsonl.gz"
fields = {prompt = "task", answer = "result"}
split = {test = 0.4, validation = 0.2, seed = 5}
metric = "exact_match"
max_new_tokens = 8
stop = ["\\n"]
"""
YAML = """
name: sums
title: Sums
data: numbers.jsonl.gz
fields: {prompt: task, answer: result}
split: {test: 0.4, validation: 0.2, seed: 5}
metric: exact_match
max_new_tokens: 8
stop: ["\\n"]
"""


def test_a_description_in_toml_or_yaml(tmp_path):
    lines = "".join(json.dumps({"task": f"add 1 to {i} .", "result": str(i + 1)}) + "\n" for i in range(60))
    (tmp_path / "numbers.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "b.yaml").write_text(YAML)
    one, other = read_task(tmp_path / "a.toml"), read_task(tmp_path / "b.yaml")
    assert (one.name, one.title, one.writing) == ("sums", "Sums", Writing(LAST_NUMBER, 8, ("\n",)))
    assert one.split_rule == SplitRule(0.2, 0.4, 5)
    assert (one.fingerprint, one.load(NO_SOURCE)) == (other.fingerprint, other.load(NO_SOURCE))


def test_data_in_several_files_keep_their_splits(tmp_path):
    write(tmp_path / "tr.jsonl", questions(50)[:40])
    write(tmp_path / "te.jsonl", questions(50)[40:])
    (tmp_path / "a.yaml").write_text("data: {train: tr.jsonl, test: te.jsonl}")
    splits = read_task(tmp_path / "a.yaml").load(NO_SOURCE)
    assert {split: len(items) for split, items in splits.items()} == {"train": 36, "validation": 4, "test": 10}


def test_validation_needs_a_file_or_ten_training_records(tmp_path, registry):
    write(tmp_path / "tr.jsonl", questions(9))
    write(tmp_path / "te.jsonl", questions(12)[9:])
    (tmp_path / "a.yaml").write_text("data: {train: tr.jsonl, test: te.jsonl}")
    with pytest.raises(DataError, match="a has 9 training items, and at least 10 are needed"):
        add_task(tmp_path / "a.yaml")


@pytest.mark.parametrize("text, message", [
    ("data: a.jsonl\nmetrics: rougeL", "x.yaml: metrics: Extra inputs are not permitted; settings are name, title"),
    ("title: 3\ndata: a.jsonl", "x.yaml: title: Input should be a valid string"),
    ("title: x", "x.yaml: data: Field required"), ("data: [", "cannot be read"),
    ("", "x.yaml: the file: Input should be"),
    ("data: nothing.jsonl", "nothing.jsonl is broken"), ("name: a/b\ndata: a.jsonl", "'a/b' cannot be a name"),
    ("name: 'a,b'\ndata: a.jsonl", "'a,b' cannot be a name"), ("data: {train: a.jsonl}", "data has no test"),
    ("data: {train: a.jsonl, tests: a.jsonl}", "x.yaml: data"),
    ("data: a.jsonl\nmetric: bleu", "metric: Input should be 'rougeL' or 'exact_match'"),
    ("data: a.jsonl\nmetric: rougeL", "metric has no effect on questions with choices"),
    ("data: a.jsonl\nstop: ['.']\nmax_new_tokens: 3", "max_new_tokens, stop has no effect"),
    ("data: a.jsonl\nfields: {references: x}", "fields.references: its data are not read"),
    ("data: a.jsonl\nfields: {answers: x}", "fields.answers"), ("data: a.jsonl\nmax_new_tokens: 0", "max_new_tokens"),
    ("data: a.jsonl\nsplit: {test: 0.9}", "split: the shares validation=0.1 and test=0.9 must"),
    ("data: a.jsonl\nsplit: {seed: 1.5}", "split.seed"), ("data: a.jsonl\nsplit: {dev: 0.1}", "split.dev: Extra"),
    ("data: {train: a.jsonl, test: a.jsonl}\nsplit: {seed: 1}", "split is for data in one file"),
])  # fmt: skip
def test_a_broken_description_is_named(tmp_path, text, message):
    write(tmp_path / "a.jsonl", questions())
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError) as error:
        read_task(tmp_path / "x.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"question": None}, "field 'question' is null"), ({"answer": 2}, "answer 2 is not one of 2 choices"),
    ({"answer": "x"}, "field 'answer' is 'x', not one of"), ({"answer": True}, "field 'answer' is true"),
    ({"choices": ["x", "x "], "answer": 0}, "choices 0 and 1 are equal"), ({"choices": ["x"]}, "field 'answer'"),
    ({"choices": "xy", "answer": 0}, "field 'choices' is 'xy', not a list"), ({"choices": None}, "'choices' is null"),
    ({"context": 3}, "field 'context' is 3"), ({"choices": [1, 2], "answer": 0}, r"choices[0] is 1, not a text"),
])  # fmt: skip
def test_a_broken_record_is_named(tmp_path, registry, change, message):
    records = questions()
    records[6] |= change
    with pytest.raises(DataError) as error:
        add_task(write(tmp_path / "a.jsonl", records))
    assert "a.jsonl, line 7: not a a item" in str(error.value) and message in str(error.value)
    assert "a" not in TASKS and "a" not in MIXTURES


def test_records_of_one_file_have_one_form(tmp_path, registry):
    with pytest.raises(DataError, match=r"line 61: .*field 'choices' is of questions"):
        add_task(write(tmp_path / "a.jsonl", [*prompts(), *questions(1)]))
    with pytest.raises(DataError, match=r"line 61: .*field 'choices' is missing"):
        add_task(write(tmp_path / "b.jsonl", [*questions(), *prompts(1)]))
    with pytest.raises(DataError, match=r"line 1: .*field 'choices' is missing"):
        add_task(write(tmp_path / "c.jsonl", [{"question": "q", "answer": "a"}]))
    with pytest.raises(DataError, match=r"line 1: .*field 'prompt' is missing"):
        add_task(write(tmp_path / "d.jsonl", [{"text": "q", "answer": "a"}]))
    (tmp_path / "e.toml").write_text('data = "e.jsonl"\nmetric = "exact_match"')
    write(tmp_path / "e.jsonl", [{"prompt": "q", "answer": "five"}])
    with pytest.raises(DataError, match=r"line 1: .*needs a number in the answer: 'five'"):
        add_task(tmp_path / "e.toml")


def test_too_few_or_equal_questions_are_refused(tmp_path, registry):
    with pytest.raises(DataError, match=r"none of its 2 items is in the .* split"):
        add_task(write(tmp_path / "a.jsonl", questions(2)))
    same = [{**record, "question": "Which?", "context": ""} for record in questions()]
    with pytest.raises(DataError, match=r"none of its 60 items is in the .* split"):
        add_task(write(tmp_path / "b.jsonl", same))


def test_a_task_joins_mixtures_by_name(tmp_path, registry):
    assert add_task(write(tmp_path / "places.jsonl", questions())) == "places"
    assert add_task(tmp_path / "places.jsonl") == "places"  # again
    assert add_to_mixture("procedural", ("places",)) == "procedural+places"
    source = Generator((("train", 40), ("validation", 20), ("test", 12)))
    data = build(MIXTURES["procedural+places"], source, format="letters", seed=0)
    assert list(data.test) == [*MIXTURES["procedural"].tasks, "places"]
    assert data.sha256["task places"] == TASKS["places"].fingerprint
    plain = build(MIXTURES["procedural"], source, format="letters", seed=0)
    assert plain.sha256.keys() == {"train", "validation", "test"} and "places" not in plain.test
    assert all(data.test[name] == plain.test[name] for name in plain.test)


def test_a_task_joins_mixtures_of_domains_as_a_domain(tmp_path, registry):
    add_task(write(tmp_path / "say.jsonl", prompts()))
    name = add_to_mixture("procedural-inter", ("say",))
    source = Generator((("train", 40), ("validation", 20), ("test", 12)))
    data = build(MIXTURES[name], source, format="letters", seed=0)
    assert "say_train" in data.validation and "say" in data.test and TASKS["say_train"].metric == LIKELIHOOD
    assert {example.task for example in data.train} >= {"say_train", "counting_train"}


def test_the_description_of_a_mixture(tmp_path, registry):
    write(tmp_path / "places.jsonl", questions())
    (tmp_path / "mine.toml").write_text(
        'tasks = ["majority", "places.jsonl"]\nblend = "even"\nsize = 9\nnote = "Mine."'
    )
    assert add_mixture(tmp_path / "mine.toml") == add_mixture(tmp_path / "mine.toml") == "mine"
    mixture = MIXTURES["mine"]
    assert (mixture.tasks, mixture.blend, mixture.size, mixture.note) == (("majority", "places"), "even", 9, "Mine.")
    assert MIXTURES["mine/places"].tasks == ("places",)
    assert len(build(mixture, Generator(), format="letters", seed=0).train) == 18


@pytest.mark.parametrize("text, message", [
    ("tasks: [majority, minority]", r"unknown task 'minority'; did you mean 'majority'\? There are piqa"),
    ("tasks: []", "tasks: List should have"),
    ("tasks: [majority, majority]", "a task is named twice"), ("tasks: [majority]\nsize: 3", "size has no effect"),
    ("tasks: [code]", "unknown task 'code'"),
    ("tasks: [majority]\nname: intra", "another task or mixture named 'intra'"),
    ("tasks: majority", "tasks: Input should be a valid list"), ("tasks: [nothing.jsonl]", "nothing.jsonl is broken"),
    ("tasks: [majority]\nblend: odd", "blend: Input should be 'size' or 'even'"),
])  # fmt: skip
def test_a_broken_description_of_a_mixture_is_named(tmp_path, registry, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    before = dict(MIXTURES)
    with pytest.raises(DataError, match=message):
        add_mixture(tmp_path / "mine.yaml")
    assert before == MIXTURES


def test_names_are_taken_once(tmp_path, registry):
    with pytest.raises(DataError, match="another task or mixture named 'piqa'"):
        add_task(write(tmp_path / "piqa.jsonl", questions()))
    add_task(write(tmp_path / "places.jsonl", questions()))
    with pytest.raises(DataError, match="another task or mixture named 'places'"):
        add_task(write(tmp_path / "places.jsonl", questions(61)))


def test_settings_and_records_make_the_fingerprint(tmp_path):
    write(tmp_path / "say.jsonl", prompts())
    found = set()
    for text in ("", "metric: rougeL", "max_new_tokens: 9", "stop: ['.']", "split: {seed: 1}", "title: Another title"):
        (tmp_path / "say.yaml").write_text(f"data: say.jsonl\n{text}")
        found.add(read_task(tmp_path / "say.yaml").fingerprint)
    assert len(found) == 4  # the metric is the default one, and a title changes no score
    changed = prompts()
    changed[3]["references"] = ["Another ."]
    found.add(read_task(write(tmp_path / "say.jsonl", changed)).fingerprint)
    assert len(found) == 5


def test_a_data_set_with_code_can_be_split_by_rule(tmp_path):
    path = write(tmp_path / "all.jsonl", [{"q": f"question {i} ?", "a": i % 2} for i in range(100)])
    task = Task(
        "subj", "Subj", lambda record: Question(record["q"], ("no", "yes"), record["a"]), DataRef("subj", ""),
        dict.fromkeys(("train", "validation", "test"), "all"), split_rule=SplitRule(seed=1),
    )  # fmt: skip
    splits = task.load(RecordFiles({"all": path}))
    assert sum(map(len, splits.values())) == 100 and min(map(len, splits.values())) > 3
