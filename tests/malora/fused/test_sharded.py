"""FSDP2 over one process.

Its weights come and go, so copies of them would be stale.
"""

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard

import malora
from malora.fused.availability import warn_once
from tests.conftest import make_model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a CPU only: it shards over gloo")
@pytest.mark.parametrize("backend", ["fused", "fp8"])
@pytest.mark.parametrize("unit", ["decoder layers", "adapted layers"])
def test_a_sharded_model_trains_like_a_dense_one_and_logs_it(unit, backend, one_process, ids, caplog):
    def losses(backend, shards):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), malora.METHODS["malora"](backend=backend, lora_dropout=0.0))
        if shards:
            model(ids)  # unsharded, it is fused
            layers = model.get_base_model().model.layers
            for module in layers if unit == "decoder layers" else model.base_model.malora_layers:
                fully_shard(module)
            fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            found.append(model(ids, labels=ids).loss)
            found[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(found)

    warn_once.cache_clear()
    sharded = losses(backend, shards=True)
    assert "weights that FSDP has sharded; the dense backend does" in caplog.text
    torch.testing.assert_close(sharded, losses("dense", shards=False))
    assert sharded[-1] < sharded[0]
