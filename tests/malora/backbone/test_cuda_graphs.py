"""Gradients of replayed micro-batches, and which models can be captured."""

import torch
from torch import nn

from malora.backbone.cuda_graphs import accumulate_grads, can_capture


def test_gradients_of_micro_batches_are_added_in_memory_of_their_own():
    replayed, sums = [torch.zeros(3), torch.zeros(2, 2)], None
    for value in (1.0, 2.0, 4.0):
        for gradient in replayed:
            gradient.fill_(value)  # a replay overwrites the gradients of the one before
        sums = accumulate_grads(sums, replayed, alone=False)
    assert all(gradient.eq(7).all() for gradient in sums)
    assert all(gradient.eq(4).all() for gradient in replayed)


def test_a_single_micro_batch_is_not_copied():
    replayed = [torch.ones(3)]
    assert accumulate_grads(None, replayed, alone=True) is replayed


def test_a_model_without_trained_parameters_has_no_gradients_to_add():
    sums = accumulate_grads(None, [], alone=False)
    assert accumulate_grads(sums, [], alone=False) == []


def test_a_model_on_a_cpu_cannot_be_captured():
    assert not can_capture(nn.Linear(2, 2))
