"""A damaged checkpoint is set aside, and the run still ends as if it had never stopped."""

import copy
import functools
import random
import shutil

import pytest
import torch

from bench.models.adapters import add_adapter
from bench.models.base import load, prepare
from bench.runs.setting import make_run_config
from bench.train.checkpoint import MAGIC, Checkpoint, TrainLog, previous_checkpoint, read_state, write_state
from bench.train.loop import make_optimizer, train
from bench.train.step import TrainStep
from tests.bench.conftest import make_setting
from tests.bench.train.test_checkpoint import KilledError
from tests.bench.train.together import LABELS, encode

CPU = torch.device("cpu")
FLIPS, FINISHED = 32, 6  # runs of the first kind are trained to the end, which takes longer than reading


@pytest.fixture(scope="module")
def config(base_folder, tmp_path_factory):
    """Twelve steps, with dropout."""
    setting = make_setting(base_folder, tmp_path_factory.mktemp("unused"), max_steps=12)
    return make_run_config(setting, "malora", seed=0, learning_rate=1e-2).replace(epochs=20)


@functools.cache
def load_once(base_folder):
    return load(prepare(str(base_folder)), CPU)[0]


def new_model(base_folder):
    model = add_adapter(
        copy.deepcopy(load_once(base_folder)), "malora", {"target_modules": ["q_proj", "v_proj"]}, seed=0
    )
    torch.manual_seed(0)
    return model


def finish(base_folder, config, path):
    """Train to the end, from the checkpoint if there is one, and return all that a record would have."""
    model = new_model(base_folder)
    log = train(model, encode(LABELS["letters"]), config, pad_id=0, checkpoint=path, checkpoint_every=4)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return weights, log.steps, log.tokens, [point["loss"] for point in log.curve if point["step"] == 12]


@pytest.fixture(scope="module")
def unbroken(base_folder, config, tmp_path_factory):
    return finish(base_folder, config, tmp_path_factory.mktemp("unbroken") / "run.pt")


@pytest.fixture(scope="module")
def killed(base_folder, config, tmp_path_factory):
    """The folder of a run that was killed in step 11, with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    calls = iter(range(100))

    def killed_in_step_11(self, micro_batches, original=TrainStep.__call__):
        if next(calls) == 10:
            raise KilledError
        return original(self, micro_batches)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(TrainStep, "__call__", killed_in_step_11)
        finish(base_folder, config, folder / "run.pt")
    assert read_state(folder / "run.pt")["log"]["steps"] == 8
    assert read_state(folder / "run.previous.pt")["log"]["steps"] == 4
    return folder


@pytest.fixture
def path(killed, tmp_path):
    """The newest checkpoint, in a folder that a test may change."""
    return shutil.copytree(killed, tmp_path / "run") / "run.pt"


def assert_same(found, expected):
    assert found[1:] == expected[1:]
    assert all(torch.equal(found[0][name], weight) for name, weight in expected[0].items())


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_run_whose_checkpoint_has_a_flipped_bit_ends_like_an_unbroken_one(
    base_folder, config, unbroken, killed, tmp_path, capsys
):
    """Flip a bit in 32 random places: of the newest checkpoint, of both, or of its first bytes.

    The first runs are trained to the end. Of the others the state is compared in which they continue or start.
    """
    size = (killed / "run.pt").stat().st_size
    identity = read_state(killed / "run.pt")["identity"]
    starts = {4: read_state(killed / "run.previous.pt")["parameters"]}
    starts[0] = {name: p.detach() for name, p in new_model(base_folder).named_parameters() if p.requires_grad}
    assert starts[0].keys() == starts[4].keys()
    for seed in range(FLIPS):
        choose = random.Random(seed)
        path = shutil.copytree(killed, tmp_path / str(seed)) / "run.pt"
        both = seed % 3 == 0
        for file in (path, previous_checkpoint(path)) if both else (path,):
            flip(file, choose.randrange(100 if seed % 6 == 1 else size), choose.randrange(8))
        if seed < FINISHED:
            assert_same(finish(base_folder, config, path), unbroken)
        else:
            log, parameters = load_into_new(base_folder, config, path, identity)
            assert (log is None) if both else (log.steps == 4)
            assert all(torch.equal(parameters[name], p) for name, p in starts[0 if both else 4].items())
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "run.pt is damaged" in line and line.endswith("starts anew." if both else "continues after step 4.")
        assert len(list(path.parent.glob("*.damaged"))) == 1 + both


def rewrite(change):
    """Change the state and give the file the right hash for it."""

    def spoil(path):
        state = read_state(path)
        change(state)
        write_state(path, state)

    return spoil


def first(state, section="parameters"):
    """Return the first tensor's dict and key: a parameter, or the moments of one."""
    found = state["parameters"] if section == "parameters" else state["optimizer"]["state"][0]
    return found, next(name for name in found if name != "step")


def replace_tensor(change, section="parameters"):
    def replace(state):
        tensors, name = first(state, section)
        tensors[name] = change(tensors[name])

    return rewrite(replace)


KINDS = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its hash": lambda path: path.write_bytes(path.read_bytes()[: len(MAGIC) + 10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("not a checkpoint"),
    "of torch.save": lambda path: torch.save({"identity": "x"}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "not a dict": lambda path: write_state(path, [1, 2]),
    "an object": lambda path: write_state(path, {"identity": TrainLog()}),
    "without a section": rewrite(lambda state: state.pop("scheduler")),
    "another section": rewrite(lambda state: state.update(more=1)),
    "another log": rewrite(lambda state: state["log"].pop("tokens")),
    "log of another type": rewrite(lambda state: state.update(log=None)),
    "without a parameter": rewrite(lambda state: state["parameters"].popitem()),
    "another name": rewrite(lambda state: state["parameters"].update(x=state["parameters"].popitem()[1])),
    "broadcast": replace_tensor(lambda tensor: tensor[..., :1].clone()),
    "scalar": replace_tensor(lambda tensor: torch.tensor(0.5)),
    "dtype": replace_tensor(lambda tensor: tensor.double()),
    "no tensor": replace_tensor(lambda tensor: None),
    "moments broadcast": replace_tensor(lambda tensor: tensor[..., :1].clone(), "moments"),
    "moments dtype": replace_tensor(lambda tensor: tensor.half(), "moments"),
    "without moments": rewrite(lambda state: state["optimizer"]["state"].pop(0)),
    "groups": rewrite(lambda state: state["optimizer"]["param_groups"][0]["params"].pop()),
    "schedule": rewrite(lambda state: state["scheduler"].pop("last_epoch")),
    "random numbers": rewrite(lambda state: state.update(random_states=[(torch.zeros(3, dtype=torch.uint8), None)])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_set_aside_and_nothing_of_it_is_used(kind, path, base_folder, config, capsys):
    identity = read_state(path)["identity"]
    KINDS[kind](path)
    log, parameters = load_into_new(base_folder, config, path, identity)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and "continues after step 4." in line
    assert log.steps == 4 and not path.exists() and path.with_name("run.pt.damaged").exists()
    expected = read_state(previous_checkpoint(path))["parameters"]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())

    previous = previous_checkpoint(path)
    KINDS[kind](previous)
    log, parameters = load_into_new(base_folder, config, path, identity)
    assert log is None and "training starts anew." in capsys.readouterr().err
    fresh = dict(new_model(base_folder).named_parameters())
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in parameters.items())


def load_into_new(base_folder, config, path, identity):
    """Load into a new model, and return the log and the trainable parameters."""
    model = new_model(base_folder)
    optimizer, scheduler = make_optimizer(model, config, 20)
    checkpoint = Checkpoint(path, identity, model, optimizer, scheduler)
    return checkpoint.load(), checkpoint.parameters
