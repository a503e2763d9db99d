"""Examples as tokens, and batches of like length. Shapes: B batch, S sequence, L label tokens of a batch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks import Example, WrittenExample

# Batches are cut from runs of this many, sorted by length: enough that a batch's lengths are nearly equal, few enough
# that every part of an epoch has batches of every length.
BATCHES_SORTED_TOGETHER = 50
PAD_TO_MULTIPLE = 8  # tensor cores want it
# What a device holds the activations of; 64 examples of 1,024 tokens need 70 GiB at once. The paper's step has as many.
# It bounds the logits too, since no example has more labels than tokens: of 16,384 labels and a vocabulary of 49,152
# they are 1.5 GiB in bfloat16 and 3 GiB in float32, and their gradients as much again.
MOST_TOKENS = {"cuda": 16_384, "cpu": 4_096}
# Where a step is captured once for each shape, few shapes: these and then multiples of the last.
GPU_WIDTHS = (*range(32, 257, 32), 320, 384, 512)


class Encoded(NamedTuple):
    """An example as token ids; the last `label_length` of them are the label."""

    ids: list[int]
    label_length: int


@dataclass
class Batch:
    """Right-padded ids, and where in them which label token is to be predicted.

    The padding stands behind all that is read, so under causal attention nothing but the balance loss needs a mask.
    """

    ids: Tensor  # [B, S]
    mask: Tensor  # [B, S], 1 for tokens and 0 for padding
    row: Tensor  # [L]
    column: Tensor  # [L]: the position before each label token
    target: Tensor  # [L], -100 for padding
    labels: Tensor  # []: label tokens of the whole batch that this is a part of

    def to(self, device: torch.device) -> Batch:
        tensors = vars(self).values()
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]  # from other memory a copy waits for the GPU
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int) -> list[Encoded]:
    """Prompts with their labels. A prompt that is too long loses its beginning, as in lm-eval.

    As in lm-eval too, the label's tokens are those that the prompt alone does not have. What is written is followed by
    the token that ends a text; where prompt and label are too long together, the label leaves half of the room to the
    prompt and loses its end.
    """
    whole = tokenizer([e.prompt + e.label for e in examples])["input_ids"]
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    encoded = []
    for example, ids, prompt in zip(examples, whole, prompts, strict=True):
        label = ids[len(prompt) :] + [tokenizer.eos_token_id] * isinstance(example, WrittenExample)
        label = label[: max_length - min(len(prompt), max_length // 2)]
        encoded.append(Encoded((ids[: len(prompt)] + label)[-max_length:], len(label)))
    return encoded


def label_tokens(examples: list[Example], encoded: list[Encoded]) -> dict[str, dict[str, int]]:
    """By task: how many examples, tokens and label tokens it gives an epoch."""
    counts: dict[str, dict[str, int]] = {}
    for example, code in zip(examples, encoded, strict=True):
        count = counts.setdefault(example.task, {"examples": 0, "tokens": 0, "label_tokens": 0})
        count["examples"] += 1
        count["tokens"] += len(code.ids)
        count["label_tokens"] += code.label_length
    return counts


def schedule(lengths: list[int], *, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The batches of a whole training, as indices; a function of its arguments alone.

    An epoch sees every example once, in batches of like length; the last batch of an epoch may be short.
    """
    rng = random.Random(seed)
    batches = []
    for _ in range(epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        span = batch_size * BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), span):
            order[start : start + span] = sorted(order[start : start + span], key=lengths.__getitem__)
        epoch = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def collate(
    encoded: list[Encoded],
    pad_id: int,
    *,
    widths: tuple[int, ...] | None = None,
    most_tokens: int = MOST_TOKENS["cuda"],
) -> list[Batch]:
    """A batch in parts of at most `most_tokens` ids and equal size.

    With `widths` its shapes recur: ids are padded to the next of them, and labels, unless each is one token, to as many
    as there are ids: every other size of label would be one more graph to capture for each width.

    The last label token is a target only; nothing is predicted from it, so it is not read.
    """
    longest = max(len(code.ids) for code in encoded) - 1
    multiple = widths[-1] if widths else PAD_TO_MULTIPLE
    width = next((w for w in widths or () if w >= longest), longest + -longest % multiple)
    parts = math.ceil(len(encoded) * width / most_tokens)
    rows = math.ceil(len(encoded) / parts)
    labels = torch.tensor(float(sum(code.label_length for code in encoded)))
    pad_labels = bool(widths) and any(code.label_length > 1 for code in encoded)
    return [_part(encoded[i : i + rows], pad_id, width, labels, pad_labels) for i in range(0, len(encoded), rows)]


def _part(encoded: list[Encoded], pad_id: int, width: int, labels: Tensor, pad_labels: bool) -> Batch:
    ids = torch.tensor([[*tokens[:-1], *[pad_id] * (width - len(tokens) + 1)] for tokens, _ in encoded])
    lengths = torch.tensor([len(tokens) - 1 for tokens, _ in encoded])
    mask = (torch.arange(width) < lengths[:, None]).long()
    places = [
        (row, len(tokens) - 1 - back, tokens[-back])
        for row, (tokens, label_length) in enumerate(encoded)
        for back in range(label_length, 0, -1)
    ]
    if pad_labels:
        places += [(0, 0, -100)] * (ids.numel() - len(places))
    row, column, target = torch.tensor(places).T.contiguous()
    return Batch(ids, mask, row, column, target, labels)
