"""Members that train together are malora layers that train alone."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

import malora
from bench.teachers.generator import TRAINING, Shape, draw_samples, make_teacher, residuals
from bench.teachers.students import STUDENTS, start_weights, trained_parameters
from bench.teachers.training import Members, SeedData, TrainingSettings, _order, errors, train

SMALL = Shape(tasks=2, n=72, m=40, r=4)
CPU = torch.device("cpu")
SETTINGS = TrainingSettings(steps=12, batch=16, dropout=0.0)
SEEDS = (3, 4)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SMALL.n, SMALL.m, bias=False)

    def forward(self, x):
        return self.layer(x)


def adapted(name, seed):
    config = replace(STUDENTS[name], task_type=None, target_modules=["layer"], lora_dropout=SETTINGS.dropout)
    base = OneLayer()
    frozen = base.layer.weight.detach().clone()
    torch.manual_seed(seed)
    return get_peft_model(base, config).train(), frozen


def train_alone(name, teacher, seed, rate):
    """Train a malora layer with PyTorch's and transformers' own tools, on y = W x + ΔW* x + σ ε."""
    model, frozen = adapted(name, seed)
    samples = draw_samples(teacher, 40, seed)
    y_Xm = samples.x_Xn @ frozen.T + residuals(teacher, samples).float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * SETTINGS.steps), SETTINGS.steps)
    for index_B in _order(seed, len(y_Xm), SETTINGS):
        loss = (model(samples.x_Xn[None, index_B])[0] - y_Xm[index_B]).square().sum(-1).mean() / SMALL.frozen_error
        if STUDENTS[name].has_router:
            loss = loss + 0.01 * malora.balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model, frozen


@pytest.mark.parametrize("name", STUDENTS)
def test_members_train_as_malora_layers_do(name):
    teachers = [make_teacher(SMALL, 0.5, 0.25, seed) for seed in SEEDS]
    members, rates = Members(teachers, [0, 1], CPU), [2e-3, 4e-3]
    data = SeedData.draw(teachers, 40, SEEDS, TRAINING, CPU)
    weights = train(STUDENTS[name], members, data, SEEDS, rates, SETTINGS)
    fresh = SeedData.draw(teachers, 50, SEEDS, 3, CPU)
    found = errors(STUDENTS[name], weights, members, fresh)
    for k, (teacher, seed, rate) in enumerate(zip(teachers, SEEDS, rates, strict=True)):
        model, frozen = train_alone(name, teacher, seed, rate)
        layer = model.base_model.model.layer
        for factor, weight in weights.items():
            alone = getattr(layer, f"malora_{factor}")["default"]
            # Adam divides by the root of a small second moment, which enlarges the rounding of a few entries. The steps
            # have moved the weights by 0.02.
            torch.testing.assert_close(
                weight[k], alone.detach(), rtol=1e-4, atol=2e-5, msg=lambda text, factor=factor: f"{factor}: {text}"
            )
        with torch.no_grad():
            change = model.eval()(fresh.x_SXn[k]) - fresh.x_SXn[k] @ frozen.T
        samples = draw_samples(teacher, 50, seed, 3)
        signal = residuals(teacher, replace(samples, noise_Xm=torch.zeros_like(samples.noise_Xm))).float()
        excess = (change - signal).square().sum(-1).mean().item()
        assert found[k] == pytest.approx((excess + SMALL.m * SMALL.noise_variance) / SMALL.frozen_error, rel=1e-5)


def test_a_frozen_subspace_stays():
    teacher = make_teacher(SMALL, 0.5, 0.5, 0)
    data = SeedData.draw([teacher], 40, [0], TRAINING, CPU)
    weights = train(STUDENTS["malora-fixed-s"], Members([teacher], [0], CPU), data, [0], [1e-3], SETTINGS)
    start = start_weights(STUDENTS["malora-fixed-s"], SMALL.n, SMALL.m, [0])
    assert weights["S"].equal(start["S"]) and not weights["P"].equal(start["P"])


def test_students_have_about_the_papers_parameters():
    counts = {name: trained_parameters(config, 576, 576) for name, config in STUDENTS.items()}
    assert counts["lora"] == 64 * 2 * 576
    assert counts["molora"] == 64 * 2 * 576 + 8 * 576  # and a router
    # P is not in the paper's count; it has at most 8 · 14 · 64 entries.
    assert all(abs(count - counts["molora"]) / counts["molora"] < 0.06 for count in counts.values()), counts


def test_a_student_learns_the_teacher():
    shape = Shape(tasks=2, n=48, m=32, r=2)
    teacher = make_teacher(shape, 0.5, 0.5, 0)
    members = Members([teacher], [0], CPU)
    data, fresh = (SeedData.draw([teacher], count, [0], stream, CPU) for count, stream in ((2000, TRAINING), (200, 3)))
    settings = TrainingSettings(steps=400)
    weights = train(STUDENTS["molora"], members, data, [0], [4.5e-3], settings)
    (error,) = errors(STUDENTS["molora"], weights, members, fresh)
    start = errors(STUDENTS["molora"], start_weights(STUDENTS["molora"], 48, 32, [0]), members, fresh)
    assert start == [pytest.approx(1, rel=0.1)]  # B = 0: the frozen layer
    assert shape.noise_floor < error < 0.7
