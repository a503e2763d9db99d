"""Matrices and models whose experts are known."""

import torch
from peft import get_peft_model

import malora
from tests.conftest import make_model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(method="malora", seed=0, trained_up=True, targets=("q_proj", "up_proj"), **options):
    """Make a model of two layers, q_proj 64 to 64 and up_proj 64 to 96.

    With `trained_up` the up projections are random, as after some training.
    """
    base = make_model()
    torch.manual_seed(seed)
    model = get_peft_model(base, malora.METHODS[method](target_modules=list(targets), **options))
    if trained_up:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if any(factor in name for factor in ("lora_B", "malora_B", "malora_S_B")):
                    p.normal_()
    return model


def rotated(angles, n=20):
    """Make two matrices whose row spaces have these principal angles.

    The first has the first axes as rows. Each row of the second is one of them, turned towards an axis of its own.
    """
    r, eye = len(angles), torch.eye(n, dtype=torch.float64)
    angles = torch.tensor(angles, dtype=torch.float64)[:, None]
    return eye[:r], angles.cos() * eye[:r] + angles.sin() * eye[r : 2 * r]
