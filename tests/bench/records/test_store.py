"""Records on disk: they are written completely or not at all.

They are read back unchanged, and published only if they can be run again.
"""

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import subprocess

import pytest
from pydantic import ValidationError

from bench.errors import UserError
from bench.experiments.methods import BASE, method_options
from bench.experiments.profiles import PROFILES
from bench.records import files, provenance, schema, store
from bench.records.files import write_atomically
from bench.records.schema import GoldAnswers, Record, RunConfig, TaskScore
from tests.bench.conftest import CLEAN

CONFIG = RunConfig(
    profile="tiny",
    model="tiny",
    model_hash="ab" * 32,
    method="lora",
    method_options={"r": 16},
    mixture="procedural",
    format="letters",
    data_hash="cd" * 32,
    seed=0,
    learning_rate=2e-3,
    epochs=1,
    batch_size=32,
    warmup_ratio=0.1,
    weight_decay=0.01,
    balance_factor=0.01,
    max_grad_norm=1.0,
    max_length=1024,
    device_type="cpu",
)


HASHES = ("items_sha256", "content_sha256")  # of later records


def score(outcomes, metric="acc"):
    """Return the score that follows from outcomes."""
    n, mean = len(outcomes), sum(outcomes) / len(outcomes)
    stderr = math.sqrt(sum((x - mean) ** 2 for x in outcomes) / (n - 1) / n) if n > 1 else None
    return {"metric": metric, "value": mean, "stderr": stderr, "n": n, "version": 1}


def make(seed=0, status="ok", method="lora", rate=2e-3, right=0.5, n=40, **options) -> Record:
    usual = {} if method == BASE else method_options(method, PROFILES["tiny"], CONFIG.mixture, {})
    config = CONFIG.replace(seed=seed, method=method, learning_rate=rate, method_options=usual)
    items = {task: [int(i < right * n) for i in range(n)] for task in ("lexicon", "majority")}
    scores = {task: score(outcomes) for task, outcomes in items.items()}
    ok = status == "ok"
    return Record(
        **{
            "config": config,
            "status": status,
            "provenance": CLEAN,
            "parameters": {"trainable": 1234, "total": 9, "adapter_bytes": 9},
            "data": {
                "sha256": {"test": "t"},
                "dropped": {"lexicon": 3},
                "dropped_validation": {"lexicon": 2},
                "train": {"lexicon": {"examples": 5, "tokens": 9, "label_tokens": 5}},
            },
            "train": {
                "steps": 70,
                "tokens": 700,
                "seconds": {"data": 1.0},
                "curve": [{"step": 10, "loss": 1.0, "balance_loss": 0.0, "grad_norm": 2.0}],
                "router": [],
                "peak_bytes": None,
            },
            "validation": scores if ok else None,
            "test": scores if ok else None,
            "items": items if ok else None,
            **options,
        }
    )


def test_a_record_reads_back_as_it_was_written(tmp_path):
    written = make()
    path = store.write(written, tmp_path)
    assert store.read(path) == written
    assert store.find(written.config, tmp_path) == written
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{written.config.id}.items.csv.gz"}
    assert json.loads(path.read_text())["config_hash"] == written.config.hash


def test_the_name_is_that_of_the_configuration_and_of_no_other():
    assert CONFIG.id.startswith("procedural-letters-lora-lr0.002-s0-")
    others = [CONFIG.replace(weight_decay=0.1), CONFIG.replace(method_options={"r": 8}), CONFIG.replace(max_steps=1)]
    assert len({c.id for c in (CONFIG, *others)}) == 4 and CONFIG.replace().id == CONFIG.id


def test_the_same_record_gives_the_same_bytes(tmp_path):
    first, second = (store.write(make(), tmp_path / name) for name in "ab")
    for one, other in zip(sorted(first.parent.iterdir()), sorted(second.parent.iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(path.read_text()[:200]),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text().replace(f'"schema": {schema.SCHEMA}', '"schema": 99')),
        lambda path: path.with_name(path.stem + ".items.csv.gz").unlink(),
        lambda path: path.with_name(path.stem + ".items.csv.gz").write_bytes(b"\x1f\x8b"),
    ],
)
def test_a_broken_record_says_which_and_what_to_do(tmp_path, spoil):
    path = store.write(make(), tmp_path)
    spoil(path)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(
        UserError, match=r"procedural-letters-lora-lr0.002-s0-\w+\.json.*(delete or restore|move it away)"
    ):
        store.read_all(tmp_path)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"id": "procedural', '"id": "another', "its id is another-letters"),
        ('"config_hash": "', '"config_hash": "0', "its config_hash is 0"),
        ('"seed": 0', '"seed": 1', "its file name is procedural-letters-lora-lr0.002-s0-"),
        ('"value": 0.5', '"value": 0.6', "its score of lexicon is 0.6, but its contents give 0.5"),
        ('"stderr": 0.08', '"stderr": 0.01', "its standard error of lexicon is 0.01"),
        ('"n": 40', '"n": 41', "its number of items of lexicon is 40, but its contents give 41"),
        ('"seed": 0', '"seed": "0"', r"config.seed: Input should be a valid integer"),
        ('"status": "ok"', '"status": "fine"', "status: Input should be"),
        ('"error": null', '"errors": null', "errors: Extra inputs are not permitted"),
        ('"error": null,', "", "without error"),
        ('"tokens": 700,', "", "train.tokens: Field required"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_with_what_differs(tmp_path, old, new, message):
    path = store.write(make(), tmp_path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{message}"):
        store.read(path)


def test_a_renamed_record_is_refused(tmp_path):
    path = store.write(make(), tmp_path)
    with pytest.raises(UserError, match="its file name is another"):
        store.read(path.rename(path.with_name("another.json")))


def test_items_of_other_tasks_are_refused(tmp_path):
    path = store.write(make(), tmp_path)
    items = path.with_name(f"{path.stem}.items.csv.gz")
    items.write_bytes(gzip.compress(b"task,item,correct\nlexicon,0,1\n"))
    with pytest.raises(UserError, match="items file's list of tasks"):
        store.read(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"task,item\nlexicon,0\n", "columns task,item"),
        (b"task,item,correct\nlexicon,0,1\nlexi", "within a line"),
        (b"task,item,correct\nlexicon,1,1\nlexicon,0,1\n", "items of lexicon are not numbered from 0"),
        (b"task,item,correct\nlexicon,0,1\nmajority,0,1\nlexicon,0,1\n", "items of lexicon are not numbered from 0"),
        *(
            (b"task,item,correct\nlexicon,0," + outcome + b"\n", "JSONDecodeError|not a number from 0 to 1")
            for outcome in (b"", b"NaN", b"null", b"true", b'"1"', b"2", b"-1")
        ),
    ],
)
def test_an_items_file_of_another_form_is_refused(tmp_path, content, message):
    path = store.write(make(), tmp_path)
    path.with_name(f"{path.stem}.items.csv.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*({message})"):
        store.read(path)


def test_a_damaged_items_file_is_refused(tmp_path):
    path = store.write(make(), tmp_path)
    items = path.with_name(f"{path.stem}.items.csv.gz")
    content = bytearray(items.read_bytes())
    content[10] = 0xFF  # a block type that deflate does not have
    items.write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*error"):
        store.read(path)


@pytest.mark.parametrize("name", [None, "../runs/x.items.csv.gz", "another.items.csv.gz"])
def test_scores_need_the_items_file_of_the_same_name(tmp_path, name):
    path = store.write(make(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"items": name}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: its items file is"):
        store.read(path)


@pytest.mark.parametrize("section", ["parameters", "data", "train", "validation", "test"])
def test_a_run_that_ended_well_has_all_sections(tmp_path, section):
    path = store.write(make(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {section: None}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*without {section}"):
        store.read(path)


@pytest.mark.parametrize("value", ["99.9", "-0.1", "NaN"])
def test_a_score_is_from_0_to_1(tmp_path, value):
    path = store.write(make(), tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"value": 0.5', f'"value": {value}'), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*value.*: Input should be"):
        store.read(path)


@pytest.mark.parametrize(
    "name", ["{} (1)", "{} copy", "Copy of {}", "{}.sync-conflict-20260101-120000-ABCDEFG", "{}~", "{}.failed-1 (1)"]
)
def test_a_copy_of_a_record_is_refused(tmp_path, name):
    """Backups and synchronisation make them; each would count as one more seed."""
    path = store.write(make(), tmp_path)
    for file in path.parent.iterdir():
        stem = file.name.removesuffix(".json").removesuffix(".items.csv.gz")
        copy = file.with_name(name.format(stem) + file.name.removeprefix(stem))
        copy.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=rf"{re.escape(name.format(path.stem))}\.json: its file name is") as error:
        store.read_all(tmp_path)
    assert "\n" not in str(error.value)


def test_a_copy_of_a_speed_record_is_refused(tmp_path):
    original = next((store.RESULTS / "speed" / "runs").glob("*.json"))
    (tmp_path / "runs").mkdir()
    for name in (original.name, f"{original.stem} (1).json"):
        (tmp_path / "runs" / name).write_bytes(original.read_bytes())
    with pytest.raises(UserError, match=r" \(1\)\.json: its file name is"):
        store.read_speed(tmp_path)


def test_a_failed_run_is_no_result_under_the_name_of_one(tmp_path):
    path = store.write(make(status="failed", error="an error"), tmp_path)
    assert store.read(path).status == "failed" and store.read_all(tmp_path) == []
    path.rename(path.with_name(f"{CONFIG.id}.json"))
    with pytest.raises(UserError, match=r"its file name is .*but its contents give .*\.failed-TIME"):
        store.find(store.read_all(tmp_path)[0].config, tmp_path)


def leaves(value, where=()):
    """Return the places of all plain values in a record."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return itertools.chain.from_iterable(leaves(one, (*where, key)) for key, one in pairs)
    return iter([where])


def test_a_record_with_any_value_changed_is_refused(tmp_path):
    """Validation scores too, whose items are not stored."""
    written = make()
    path = store.write(written, tmp_path)
    text = path.read_text(encoding="utf-8")
    places = list(leaves(json.loads(text)))
    assert ("validation", "lexicon", "value") in places and ("train", "curve", 0, "loss") in places
    for where in places:
        content = json.loads(text)
        section = content
        for key in where[:-1]:
            section = section[key]
        old = section[where[-1]]
        section[where[-1]] = {bool: not old, int: 0 if old else 1, float: 0.25}.get(type(old), "another")
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"\.json"):
            store.read(path)
            pytest.fail(f"{where} was changed")
    path.write_text(text, encoding="utf-8")
    assert store.read(path) == written


def test_items_that_give_the_same_score_in_another_order_are_refused(tmp_path):
    """Paired tests between methods need the order."""
    path = store.write(make(right=0.4), tmp_path)
    items = path.with_name(f"{path.stem}.items.csv.gz")
    for seed in range(50):
        outcomes = make(right=0.4).items
        random.Random(seed).shuffle(outcomes["majority"])
        items.write_bytes(store._items_to_bytes(outcomes, None))
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}: its items_sha256 is"):
            store.read(path)


def test_an_older_record_is_checked_by_what_its_items_give(tmp_path):
    path = store.write(make(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    older = {name: value for name, value in content.items() if name not in HASHES}
    path.write_text(json.dumps(older), encoding="utf-8")
    assert store.read(path).test == make().test
    older["test"]["lexicon"]["value"] = 0.99
    path.write_text(json.dumps(older), encoding="utf-8")
    with pytest.raises(UserError, match=r"its score of lexicon is 0\.99, but its contents give 0\.5"):
        store.read(path)


def test_fields_that_were_never_set_are_not_written(tmp_path):
    """An older record has the same bytes when it is written again."""
    data = {"sha256": {"test": "t"}, "dropped": {}}
    path = store.write(make(data=data), tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["data"] == data
    assert store.read(path).data.dropped_validation is None


def test_a_section_is_frozen_and_its_copies_are_validated():
    with pytest.raises(ValidationError, match="frozen"):
        CONFIG.seed = 1
    with pytest.raises(ValidationError, match="valid integer"):
        CONFIG.replace(seed="one")
    with pytest.raises(ValidationError, match="Extra inputs"):
        CONFIG.replace(sed=1)
    with pytest.raises(ValidationError, match="status"):
        make().status = "fine"


def test_the_hash_of_a_configuration_is_that_of_its_plain_values():
    fields = CONFIG.model_dump()
    assert fields.pop("scorer_versions") is None  # a later field, which the hashes of older records do not cover
    plain = json.dumps(fields, sort_keys=True)
    assert CONFIG.hash == hashlib.sha256(plain.encode()).hexdigest()
    assert (
        CONFIG.hash == "fd33d49b0f105cd0808f5ecf28ba6b74a43925df7f02d2d3710dd30c2db3e30b"
    )  # as before records were typed


def test_published_records_are_written_again_byte_for_byte(tmp_path):
    """The first records of each profile, and all of speed; reading checks all of them. Older ones gain hashes."""
    for profile in ("tiny", "small"):
        for path in sorted((store.RESULTS / profile / "runs").glob("*.json"))[:5]:
            written = store.write(store.read(path), tmp_path / profile)
            content = json.loads(written.read_text(encoding="utf-8"))
            content = {name: value for name, value in content.items() if name not in HASHES or name in path.read_text()}
            assert json.dumps(content, indent=1) + "\n" == path.read_text(encoding="utf-8")
            items = f"{path.stem}.items.csv.gz"
            assert written.with_name(items).read_bytes() == path.with_name(items).read_bytes()
    for record in store.read_speed(store.RESULTS / "speed"):
        written = store.write_speed(record, tmp_path / "speed")
        assert written.read_bytes() == (store.RESULTS / "speed" / "runs" / written.name).read_bytes()


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    write_atomically(path, "β before")
    assert path.read_bytes() == "β before".encode()
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "after")
    assert path.read_text(encoding="utf-8") == "β before"


def test_an_interrupted_write_leaves_nothing_that_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write(make(), tmp_path)
    assert store.read_all(tmp_path) == []


def test_publishing_takes_complete_records_of_committed_code_and_replaces_none(tmp_path, history):
    assert len(store.publish([make(0), make(1)], tmp_path)[0]) == 2
    before = {p.name: p.read_bytes() for p in (tmp_path / "runs").iterdir()}
    assert store.publish([make(0, right=0.9)], tmp_path) == ([], [])
    assert {p.name: p.read_bytes() for p in (tmp_path / "runs").iterdir()} == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"provenance": CLEAN.replace(source_sha256="12" * 32)}, "made from code that no commit here has"),
        ({"config": CONFIG.replace(max_items=3)}, "was cut short"),
    ],
)
def test_publishing_refuses_the_rest_and_says_why(tmp_path, history, options, message):
    paths, refused = store.publish([make(1), make(0).replace(**options)], tmp_path)
    assert len(paths) == 1 and len(refused) == 1 and message in refused[0]


def test_trials_are_published_apart_from_complete_runs(tmp_path, history):
    complete, trial = make(1), make(0).replace(config=CONFIG.replace(max_steps=500))
    (path,), (refused,) = store.publish([complete, trial], tmp_path, cut_short=True)
    assert store.read(path).config.max_steps == 500 and not store.read(path).complete and "is complete" in refused


def test_publishing_names_the_commit_whose_code_it_was(tmp_path, history):
    """A machine may have had the tree without its history, or with an older one."""
    for folder, found in {"a": None, "b": "earlier"}.items():
        made = make(0).replace(provenance=CLEAN.replace(commit=found, dirty=True))
        (path,), _ = store.publish([made], tmp_path / folder)
        published = store.read(path).provenance
        assert (published.commit, published.dirty) == (CLEAN.commit, False)


def test_a_commit_has_the_hash_of_its_sources():
    """`publish` relies on it for records from machines that had no history."""
    try:
        clean = not subprocess.run(
            ["git", "status", "--porcelain", "--", *(f":(glob){name}/**/*.py" for name in provenance.SOURCES)],
            cwd=provenance.ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=provenance.ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (provenance.source_hash_of(head.strip()) == provenance.source_hash()) == clean
    assert provenance.source_hash_of("0" * 40) is None


def test_outcomes_between_right_and_wrong_are_read_back_as_they_were(tmp_path):
    items = {"lexicon": [1, 0, 1], "report": [2 / 3, 1e-9, 1.0, 0.1 + 0.2]}
    scores = {task: score(outcomes, "rougeL") for task, outcomes in items.items()}
    written = store.write(make(items=items, test=scores), tmp_path)
    assert store.read(written).items == items


def with_losses():
    one = make()
    nats = [round(0.1 + i / 7, 4) for i in range(40)]
    gold = {
        "lexicon": GoldAnswers(nats=nats, label_tokens=[2] * 40, classes=[i % 3 for i in range(40)]),
        "majority": GoldAnswers(nats=nats, label_tokens=[1, 3] * 20),
    }
    test = {task: TaskScore(**score(one.items[task]), **gold[task].summary(one.items[task])) for task in gold}
    return one.replace(test=test, gold=gold)


def test_losses_and_classes_read_back_as_they_were_written(tmp_path):
    written = with_losses()
    path = store.write(written, tmp_path)
    assert store.read(path) == written and written.test["majority"].balanced is None
    assert store.write(store.read(path), tmp_path / "again").read_bytes() == path.read_bytes()
    assert "loss" not in json.loads(store.write(make(seed=1), tmp_path).read_text())["test"]["lexicon"]


@pytest.mark.parametrize("change", [
    lambda test, gold: (test, {**gold, "majority": gold["lexicon"]}),  # other label tokens
    lambda test, gold: (test, {**gold, "lexicon": gold["lexicon"].replace(nats=[0.5] * 40)}),
    lambda test, gold: (test, {**gold, "lexicon": gold["lexicon"].replace(classes=[i // 20 for i in range(40)])}),
    lambda test, gold: (test, None),
    lambda test, gold: ({**test, "lexicon": test["lexicon"].replace(loss=None)}, gold),
    lambda test, gold: ({**test, "lexicon": test["lexicon"].replace(balanced=0.9)}, gold),
])  # fmt: skip
def test_losses_that_do_not_follow_from_the_items_are_refused(change, tmp_path):
    one = with_losses()
    test, gold = change(one.test, one.gold)
    path = store.write(one.replace(test=test, gold=gold), tmp_path)
    with pytest.raises(
        UserError, match=r"its (loss|label_tokens|classes|balanced|largest_class) of (lexicon|majority)"
    ):
        store.read(path)


def test_the_mixture_of_a_single_domain_names_a_file(tmp_path):
    one = make()
    path = store.write(one.replace(config=one.config.replace(mixture="inter/code")), tmp_path)
    assert path.parent == tmp_path / "runs" and store.read(path).config.mixture == "inter/code"


def test_an_items_file_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    path = store.write(make(), tmp_path)
    monkeypatch.setattr(store, "MAX_ITEMS_BYTES", 100)
    with pytest.raises(UserError, match="the items file unpacks to more than"):
        store.read(path)


@pytest.mark.parametrize("change", [
    lambda content: content["data"]["sha256"].pop("test"),
    lambda content: content["train"].update(tokens=10**400),
    lambda content: content["train"]["seconds"].update(data=math.nan),
])  # fmt: skip
def test_a_record_that_would_break_its_page_is_refused(change, tmp_path):
    path = store.write(make(), tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a complete record"):
        store.read(path)
