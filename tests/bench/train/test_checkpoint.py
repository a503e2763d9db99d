"""A killed run continues from its checkpoint."""

import pytest

from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.train.step import EagerStep
from tests.bench.conftest import make_setting

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class KilledError(BaseException):
    """Stands for a signal: no `except Exception` catches it."""


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_a_killed_run_that_is_resumed_ends_bitwise_like_an_unbroken_one(method, base_folder, tmp_path, monkeypatch):
    """Kill a run at step 8, after the checkpoint at step 5, and resume it.

    With dropout the generator's state is tested as well.
    """

    def train_adapter(folder):
        setting = make_setting(base_folder, tmp_path / folder, save=tmp_path / folder / "adapter")
        result = run(make_run_config(setting, method, seed=0, learning_rate=1e-2), setting)
        assert result.status == "ok", result.error
        return (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes(), result

    unbroken, expected = train_adapter("unbroken")
    with monkeypatch.context() as patched:
        calls = iter(range(100))

        def killed_at_step_8(self, micro_batches, original=EagerStep.__call__):
            if next(calls) == 8:
                raise KilledError
            return original(self, micro_batches)

        patched.setattr(EagerStep, "__call__", killed_at_step_8)
        with pytest.raises(KilledError):
            train_adapter("killed")
    assert list((tmp_path / "killed" / "checkpoints").glob("*.pt")) and not (tmp_path / "killed" / "runs").exists()
    resumed, result = train_adapter("killed")
    assert resumed == unbroken
    assert result.train.curve == expected.train.curve and result.items == expected.items
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.pt"))
