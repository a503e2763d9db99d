"""Examples as tokens, and batches of them in rows. Shapes: R rows, C tokens of a row, L label tokens of a batch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks import Example, WrittenExample

# A batch is drawn at random, so that it holds all tasks: one of like lengths would hold mostly one task, and a balance
# loss would press the routers to be even within each. Its examples are laid into rows one after the other, which leaves
# about a tenth for padding, and none sees another. A row is at least as long as the longest.
PACKED_ROW_LENGTH = {"cuda": 512, "cpu": 128}
PAD_TO_MULTIPLE = 64  # tokens of a batch that does not fill a row
ROWS_MULTIPLE, FEW_ROWS = 2, 4  # where a step is captured once for each shape, few shapes; of few rows every one counts
# What a device holds the activations of; 64 examples of 1,024 tokens need 70 GiB at once. The paper's step has as many.
# It bounds the logits too, since no example has more labels than tokens: of 16,384 labels and a vocabulary of 49,152
# they are 1.5 GiB in bfloat16 and 3 GiB in float32, and their gradients as much again.
MAX_TOKENS = {"cuda": 16_384, "cpu": 4_096}


class Encoded(NamedTuple):
    """An example as token ids; the last `label_length` of them are the label."""

    ids: list[int]
    label_length: int


@dataclass
class Batch:
    """Ids in rows, and where in them which label token is to be predicted."""

    ids: Tensor  # [R, C]
    position: Tensor  # [R, C]: place in its example
    example: Tensor  # [R, C]: number of its example in the row, from 1 on; 0 for padding
    row: Tensor  # [L]
    column: Tensor  # [L]: the position before each label token
    target: Tensor  # [L], -100 for padding
    labels: Tensor  # []: label tokens of the whole batch that this is a part of

    @property
    def mask(self) -> Tensor:
        """[R, C], true for tokens and false for padding."""
        return self.example > 0

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """[R, 1, C, C], by the token that looks and the one it looks at: 0 if that is of its example and not after it,
        else -inf. Padding sees padding, since attention to nothing would be NaN."""
        before = torch.ones(2 * self.ids.shape[-1:], dtype=torch.bool, device=self.ids.device).tril()
        visible = before & (self.example[:, :, None] == self.example[:, None, :])
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None]

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


def schedule(count: int, *, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The batches of a whole training on `count` examples, as indices; a function of its arguments alone.

    An epoch sees every example once; its last batch may be short.
    """
    rng = random.Random(seed)
    batches = []
    for _ in range(epochs):
        order = list(range(count))
        rng.shuffle(order)
        batches += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches


def collate(
    encoded: list[Encoded],
    pad_id: int,
    *,
    row: int = PACKED_ROW_LENGTH["cuda"],
    max_tokens: int = MAX_TOKENS["cuda"],
    fixed_shapes: bool = False,
) -> list[Batch]:
    """A batch in parts of at most `most_tokens` ids, or a row, and examples of all lengths in each.

    Where shapes are to `recur`, labels are padded: to as many as there are examples where each is one token, else to as
    many as there are ids. Every other number would be one more graph to capture for each number of rows.

    The last label token is a target only; nothing is predicted from it, so it is not read.
    """
    lengths = [len(code.ids) - 1 for code in encoded]
    total, longest = sum(lengths), max(lengths)
    width = math.ceil(longest / row) * row if total > row else math.ceil(total / PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
    rows = _rows(lengths, width)
    if fixed_shapes and len(rows) > FEW_ROWS and max_tokens >= 2 * width:  # no part is of padding alone
        rows += [[]] * (-len(rows) % ROWS_MULTIPLE)
    labels = torch.tensor(float(sum(code.label_length for code in encoded)))
    parts = math.ceil(len(rows) / max(1, max_tokens // width))
    size = None
    if fixed_shapes:
        single = all(code.label_length == 1 for code in encoded)
        size = len(encoded) if single else math.ceil(len(rows) / parts) * width
    return [
        _make_micro_batch([[encoded[i] for i in one] for one in rows[first::parts]], pad_id, width, labels, size)
        for first in range(parts)
    ]


def _rows(lengths: list[int], width: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((place for place, free in enumerate(room) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


def _make_micro_batch(rows: list[list[Encoded]], pad_id: int, width: int, labels: Tensor, size: int | None) -> Batch:
    """With `size` labels, where it is given."""
    ids, position, example = (torch.full((len(rows), width), fill) for fill in (pad_id, 0, 0))
    places = []
    for row, codes in enumerate(rows):
        start = 0
        for number, (tokens, label_length) in enumerate(codes, 1):
            end = start + len(tokens) - 1
            ids[row, start:end] = torch.tensor(tokens[:-1])
            position[row, start:end] = torch.arange(end - start)
            example[row, start:end] = number
            places += [(row, end - back, tokens[-back]) for back in range(label_length, 0, -1)]
            start = end
    filled = torch.tensor([(0, 0, -100)]).repeat(max(len(places), size or 0), 1)
    filled[: len(places)] = torch.tensor(places)
    row, column, target = filled.T.contiguous()
    return Batch(ids, position, example, row, column, target, labels)
