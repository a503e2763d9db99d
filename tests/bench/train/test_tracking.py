"""Trackers get what the record has, and do not change it."""

from collections import defaultdict

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import bench.runs.run
from bench.cli.parser import main
from bench.errors import UserError
from bench.experiments.methods import BASE
from bench.records import store
from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.runtime import progress
from bench.train import loop, tracking
from tests.bench import launch
from tests.bench.cli.helpers import refused
from tests.bench.conftest import make_setting

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Recorder(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """A tracker that keeps what it gets, in place of TensorBoard's."""

    name = "tensorboard"
    requires_logging_directory = True
    made: list["Recorder"] = []  # noqa: RUF012

    def __init__(self, run_name, logging_dir, **options):
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.config: dict = {}
        self.logged: dict[int, dict[str, float]] = defaultdict(dict)
        self.events: list[str] = []
        self.made.append(self)

    @property
    def tracker(self):
        return self.logged

    def start(self):
        self.events.append("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        assert self.events == ["start"]
        self.logged[step] |= values

    def finish(self):
        self.events.append("finish")


@pytest.fixture
def recorders(monkeypatch):
    """Replace TensorBoard's tracker by a Recorder, and return those that are made."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", lambda: True)
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(loop, "ROUTER_EVERY", 5)
    return Recorder.made


def outcome(record):
    """Everything in a record that does not depend on the time."""
    train = record.train and record.train.replace(seconds={}, steady_step_seconds=None)
    return record.config, record.parameters, record.data, train, record.validation, record.test, record.items


def test_a_tracker_gets_the_figures_of_the_record_and_does_not_change_it(
    base_folder, tmp_path, recorders, monkeypatch, capsys
):
    def made(folder, **options):
        setting = make_setting(base_folder, tmp_path / folder, max_items=4, **options)
        return run(make_run_config(setting, "malora", seed=0), setting)

    plain = made("plain")
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    record = made("tracked", track=("tensorboard",))
    assert outcome(record) == outcome(plain) and plain.config.id == record.config.id
    lines = [line for line in capsys.readouterr().err.splitlines() if ": step " in line]  # others are of scoring
    starts = [f"{record.id}: step {step}/{record.train.steps}, loss " for step in range(1, record.train.steps + 1)]
    assert len(lines) == len(starts) and all(map(str.startswith, lines, starts))

    (tracker,) = recorders
    assert tracker.run_name == record.id and tracker.events == ["start", "finish"]
    assert tracker.logging_dir == tmp_path / "tracked" / "tracking" / "tensorboard"
    assert (
        tracker.config["method"] == "malora" and tracker.config["method_options.r"] == record.config.method_options["r"]
    )
    assert tracker.config["max_steps"] == "None"
    logged, steps = tracker.logged, record.train.steps
    for point in record.train.curve:
        for name in ("loss", "balance_loss", "grad_norm"):
            assert logged[point.step][f"train/{name}"] == pytest.approx(getattr(point, name), rel=1e-4)
        # Without warmup, the rate falls by a line from its maximum in the first step.
        expected = record.config.learning_rate * (1 - (point.step - 1) / steps)
        assert logged[point.step]["train/learning_rate"] == pytest.approx(expected)
    assert logged[steps]["train/tokens"] == record.train.tokens
    assert [point.step for point in record.train.router] == list(range(5, steps + 1, 5))
    for point in record.train.router:
        for name in ("entropy", "gate_sum", "largest_share", "unused_experts"):
            assert logged[point.step][f"router/{name}"] == pytest.approx(getattr(point, name), rel=1e-4)
    for split, scores in (("validation", record.validation), ("test", record.test)):
        assert logged[steps][f"{split}/mean"] == record.mean(split)
        assert {task: logged[steps][f"{split}/{task}"] for task in scores} == {
            t: 100 * s.value for t, s in scores.items()
        }


def test_the_base_logs_its_scores_and_a_failed_run_ends_its_log(base_folder, tmp_path, recorders, monkeypatch):
    setting = make_setting(base_folder, tmp_path, max_items=2, track=("tensorboard",))
    record = run(make_run_config(setting, BASE, 0), setting)
    assert recorders[0].logged == {
        0: {"test/mean": record.mean()} | {f"test/{t}": 100 * s.value for t, s in record.test.items()}
    }
    monkeypatch.setattr(bench.runs.run, "score", lambda *a, **k: 1 / 0)
    assert run(make_run_config(setting, "lora", seed=0), setting).status == "failed"
    assert recorders[1].events == ["start", "finish"] and "train/loss" in recorders[1].logged[10]


def test_a_tracker_that_cannot_start_is_no_failed_run(base_folder, tmp_path, recorders, monkeypatch):
    def start(self):
        raise OSError("no login\nat all")

    monkeypatch.setattr(Recorder, "start", start)
    setting = make_setting(base_folder, tmp_path, track=("tensorboard",))
    with pytest.raises(UserError, match=r"--track tensorboard cannot start \(OSError: no login\)\."):
        run(make_run_config(setting, "lora", seed=0), setting)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(name, base_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, name, lambda: False)
    with pytest.raises(UserError, match=f"--track {name} needs the package {name}: pip install {name}"):
        tracking.require_trackers((name,))
    for command in ("run", "table2"):
        arguments = [command, "--profile", "tiny", "--model", base_folder, "--track", name, "--results", tmp_path / "r"]
        assert f"--track {name} needs the package {name}" in refused(arguments, capsys, tmp_path)


def read_events(results, record):
    """Return the scalars of a run's event files: values by name and step, each logged once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(results / "tracking" / "tensorboard" / record.id))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    by_step = {name: {event.step: event.value for event in found} for name, found in scalars.items()}
    assert all(len(by_step[name]) == len(found) for name, found in scalars.items())
    return by_step


def check_events(results, record):
    scalars = read_events(results, record)
    assert scalars["test/mean"] == pytest.approx({record.train.steps if record.train else 0: record.mean()})
    if record.train:
        assert scalars["train/loss"] == pytest.approx({p.step: p.loss for p in record.train.curve}, rel=1e-4)


def test_tensorboard_reads_the_curves_of_a_table_of_two_jobs(base_folder, tmp_path, capsys):
    """From the command line to the event files, each run in a folder of its own."""
    pytest.importorskip("tensorboard")
    command = "table2 --profile tiny --methods lora,malora --seeds 1 --max-steps 12 --max-items 2 --jobs 2"
    options = [*command.split(), "--track", "tensorboard", "--model", str(base_folder), "--results", str(tmp_path)]
    assert main(options) == 0
    capsys.readouterr()
    for record in store.read_all(tmp_path):
        check_events(tmp_path, record)


def test_of_two_processes_that_share_a_run_one_logs_it(base_folder, tmp_path):
    pytest.importorskip("tensorboard")
    command = "run --profile tiny --method malora --max-steps 12 --max-items 2 --track tensorboard --model".split()
    done = launch.run_bench(*command, base_folder, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run: 1 of 1 runs to make") == 1
    (record,) = store.read_all(tmp_path)
    check_events(tmp_path, record)
