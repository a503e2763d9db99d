"""Train many students of one shape at once, and measure their errors on fresh inputs.

The optimizer is that of the protocol's rules for all parts: AdamW with weight decay 0.01, warm-up over 0.1 of the
steps, linear decay, gradients of each member clipped to norm 1, dropout 0.05, batches of 64 and the last weights. Each
member has data, teacher and learning rate of its own, and no member's loss has a gradient in another's weights.

The loss of a member is the squared error, summed over outputs, relative to the expected one of the frozen layer, plus
the weighted balance loss of its router. It starts near 1 for every teacher, so the weight means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from bench.teachers.generator import ORDER, Samples, Shape, Teacher, draw_samples, random_numbers
from bench.teachers.students import Weights, predict, start_weights
from malora import MaloraConfig
from malora.routing import top_k_mask


@dataclass(frozen=True)
class TrainingSettings:
    """How every student is trained.

    Attributes:
        steps: Optimizer steps. The protocol fixes none for the teachers.
        batch: Samples per batch, of all tasks together.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Gradients of a member are clipped to this norm.
        balance_factor: Weight of the balance loss.
        dropout: Dropout probability of the down projections' input.
    """

    steps: int = 1000
    batch: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    balance_factor: float = 0.01
    dropout: float = 0.05


class SeedData:
    """Samples of several seeds, stacked, for teachers that differ in their dials only.

    Args:
        by_seed: Samples of each seed, equally many.
        device: Where to keep them.
    """

    def __init__(self, by_seed: Sequence[Samples], device: torch.device) -> None:
        self.x_SXn = torch.stack([samples.x_Xn for samples in by_seed]).to(device)
        self.noise_SXm = torch.stack([samples.noise_Xm for samples in by_seed]).to(device)
        self.task_X = by_seed[0].task_X.to(device)

    @classmethod
    def draw(
        cls, teachers: Sequence[Teacher], samples: int, seeds: Sequence[int], stream: int, device: torch.device
    ) -> SeedData:
        """Draw the samples of each seed, by a teacher of that seed."""
        pairs = zip(teachers, seeds, strict=True)
        return cls([draw_samples(teacher, samples, seed, stream) for teacher, seed in pairs], device)


class Members:
    """Teachers of the members that train together, and which seed's data each of them has.

    Args:
        teachers: Teacher of each member, all of one shape.
        seed_of: Index of each member's seed in the data.
        device: Where to compute.
    """

    def __init__(self, teachers: Sequence[Teacher], seed_of: Sequence[int], device: torch.device) -> None:
        self.shape: Shape = teachers[0].shape
        self.seed_of_K = torch.tensor(seed_of, device=device)
        self.device = device
        self.down_KTrn = torch.stack([teacher.down_Trn for teacher in teachers]).float().to(device)
        up_KTmr = torch.stack([teacher.up_Tmr for teacher in teachers]).float().to(device)
        self._up_KRm = up_KTmr.mT.flatten(1, 2).contiguous()  # R = T·r: the tasks' up projections below each other

    def teacher_features(self, data: SeedData) -> Tensor:
        """Compute A*_t x of every sample for each member, [K, T·N, r]."""
        T = self.shape.tasks
        x_STNn = data.x_SXn.unflatten(1, (T, -1))
        pairs = zip(self.seed_of_K.tolist(), self.down_KTrn, strict=True)
        return torch.stack([(x_STNn[s] @ down_Trn.mT).flatten(0, 1) for s, down_Trn in pairs])

    def teacher_outputs(self, z_KBr: Tensor, task_KB: Tensor) -> Tensor:
        """Compute B*_t z, [K, B, m], for features z of samples of these tasks."""
        is_of_KBT1 = torch.nn.functional.one_hot(task_KB, self.shape.tasks).to(z_KBr.dtype).unsqueeze(-1)
        return (is_of_KBT1 * z_KBr.unsqueeze(2)).flatten(2) @ self._up_KRm


def train(
    config: MaloraConfig,
    members: Members,
    data: SeedData,
    seeds: Sequence[int],
    rates: Sequence[float],
    settings: TrainingSettings,
) -> Weights:
    """Train a student for each member, and return their weights after the last step.

    Args:
        config: Method of the students.
        members: Teachers, and seeds of the data.
        data: Training samples by seed.
        seeds: The seeds in `data`; they also fix initial weights and the order of the data.
        rates: Learning rate of each member.
        settings: How to train.
    """
    shape, device, seed_of_K = members.shape, members.device, members.seed_of_K
    weights = {
        name: weight.detach().to(device)[seed_of_K].requires_grad_(weight.requires_grad)
        for name, weight in start_weights(config, shape.n, shape.m, seeds).items()
    }
    trained = [weight for weight in weights.values() if weight.requires_grad]
    optimizer, views = _optimizer(trained, rates, settings)
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * settings.steps), settings.steps)
    dropout = nn.Dropout(settings.dropout).train()
    z_KXr = members.teacher_features(data)
    order = torch.stack([_order(seed, len(data.task_X), settings) for seed in seeds]).to(device)  # [S, steps, B]
    seed_S1, member_K1 = (
        torch.arange(len(seeds), device=device)[:, None],
        torch.arange(len(rates), device=device)[:, None],
    )
    torch.manual_seed(seeds[0])  # of dropout
    for step in range(settings.steps):
        index_SB = order[:, step]
        index_KB = index_SB[seed_of_K]
        x_KBn = data.x_SXn[seed_S1, index_SB][seed_of_K]
        noise_KBm = data.noise_SXm[seed_S1, index_SB][seed_of_K]
        y_KBm = members.teacher_outputs(z_KXr[member_K1, index_KB], data.task_X[index_KB]) + noise_KBm
        loss_K = member_losses(config, weights, x_KBn, y_KBm, dropout, shape, settings)
        # The fused AdamW reads gradients in the layout of the weights, which those of a matmul may not have.
        gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss_K.sum(), trained)]
        _clip_by_member(gradients, settings.max_grad_norm)
        for gradient, of_weight in zip(gradients, views, strict=True):
            for view, part in of_weight:
                view.grad = gradient[part]
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


def member_losses(
    config: MaloraConfig,
    weights: Weights,
    x_KBn: Tensor,
    y_KBm: Tensor,
    dropout: nn.Module,
    shape: Shape,
    settings: TrainingSettings,
) -> Tensor:
    """Compute the loss of each member on its batch, [K]."""
    change_KBm, probability_KBN = predict(config, weights, x_KBn, dropout)
    loss_K = (change_KBm - y_KBm).square().sum(-1).mean(-1) / shape.frozen_error
    if probability_KBN is None:
        return loss_K
    return loss_K + settings.balance_factor * balance_losses(probability_KBN, config.top_k)


def balance_losses(probability_KBN: Tensor, top_k: int) -> Tensor:
    """Compute `malora.balance_loss` of each member's router on its own samples, [K]."""
    share_KN = top_k_mask(probability_KBN, top_k).mean(1) / top_k
    return probability_KBN.shape[-1] * (share_KN * probability_KBN.mean(1)).sum(-1)


@torch.no_grad()
def errors(config: MaloraConfig, weights: Weights, members: Members, data: SeedData) -> list[float]:
    """Return each member's squared error on fresh inputs, the mean over tasks, relative to that of the frozen layer.

    The labels' noise is independent of the student and enters by its expectation. So do the errors of the frozen layer.
    A diverged member's error is not finite.
    """
    shape, dropout = members.shape, nn.Dropout(0.0).eval()
    z_KTNr = members.teacher_features(data).unflatten(1, (shape.tasks, -1))
    excess_K = torch.zeros(len(z_KTNr), device=members.device)
    for t, x_SNn in enumerate(data.x_SXn.unflatten(1, (shape.tasks, -1)).unbind(1)):
        z_KNr = z_KTNr[:, t]
        y_KNm = members.teacher_outputs(z_KNr, torch.full(z_KNr.shape[:2], t, device=members.device))
        change_KNm, _ = predict(config, weights, x_SNn[members.seed_of_K], dropout)
        excess_K += (change_KNm - y_KNm).square().sum(-1).mean(-1) / shape.tasks
    relative = (excess_K.double() + shape.m * shape.noise_variance) / shape.frozen_error
    return [float(value) for value in relative]


def _optimizer(
    trained: list[Tensor], rates: Sequence[float], settings: TrainingSettings
) -> tuple[torch.optim.Optimizer, list[list[tuple[Tensor, slice]]]]:
    """Return AdamW over all members, and the views that it writes to with their places in each stacked weight.

    Neighbouring members with one rate share a view.
    """
    views: list[list[tuple[Tensor, slice]]] = [[] for _ in trained]
    groups = []
    for rate, of_rate in groupby(range(len(rates)), key=rates.__getitem__):
        places = list(of_rate)
        part = slice(places[0], places[-1] + 1)
        for weight, of_weight in zip(trained, views, strict=True):
            of_weight.append((weight.detach()[part], part))
        groups.append({"params": [of_weight[-1][0] for of_weight in views], "lr": rate})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True), views


def _order(seed: int, samples: int, settings: TrainingSettings) -> Tensor:
    """Return the samples of each batch, [steps, B]: passes over all samples, each in an order of its own."""
    generator, needed = random_numbers(seed, ORDER), settings.steps * settings.batch
    passes = [torch.randperm(samples, generator=generator) for _ in range(-(-needed // samples))]
    return torch.cat(passes)[:needed].view(settings.steps, settings.batch)


def _clip_by_member(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each member's gradients down to this norm, in place, as `torch.nn.utils.clip_grad_norm_` does for one."""
    norm_K = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    scale_K = (max_norm / (norm_K + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale_K.view(-1, *[1] * (gradient.dim() - 1)))
