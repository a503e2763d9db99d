"""Tokenize examples and pack them into micro-batches.

A batch is drawn at random, so that it mixes all tasks. Batches of examples of similar length would hold mostly one task
each, and the balance loss would then push the routers to be even within every task. The examples of a batch are packed
one after the other into sequences of equal length. A mask keeps them from attending to each other, and about a tenth of
the positions is padding.

Shapes:
    R: packed sequences of a micro-batch
    C: tokens per packed sequence
    L: label tokens of a micro-batch
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bench.errors import UserError
from bench.runtime.tokens import encode_texts, split_label
from bench.train.fixed_shapes import PAD_TO_MULTIPLE, FixedShapes, choose_shapes
from tasks import TASKS, Example, WrittenExample

# Tokens per packed sequence, by device. An example that is longer gets a multiple of it.
PACKED_ROW_LENGTH = {"cuda": 512, "cpu": 128}
# With fixed shapes every number of sequences costs a CUDA graph, so odd numbers above MAX_UNPADDED_ROWS are padded to
# even ones. For fewer sequences one of padding alone would cost too much.
ROWS_MULTIPLE, MAX_UNPADDED_ROWS = 2, 4
# Tokens per micro-batch, by device, so that the activations fit: 64 examples of 1,024 tokens need 70 GiB at once.
# No example has more labels than tokens, so this also bounds the logits: 16,384 labels of a vocabulary of 49,152 take
# 1.5 GiB in bfloat16 and 3 GiB in float32, and their gradients the same again.
MAX_TOKENS = {"cuda": 16_384, "cpu": 4_096}
IGNORED_TARGET = -100  # F.cross_entropy ignores it by default


class Encoded(NamedTuple):
    """An example as token ids; the last `label_length` of them are the label."""

    ids: list[int]
    label_length: int


@dataclass
class Batch:
    """A micro-batch: packed token ids, and the label tokens to predict from them.

    Attributes:
        ids: Token ids, [R, C].
        position: Position of each token in its example, [R, C].
        example: Number of each token's example within its sequence, counted from 1, [R, C]; 0 for padding.
        row: Sequence that each label token is predicted from, [L].
        column: Position in that sequence, one before the label token, [L].
        target: Label tokens, [L]; `IGNORED_TARGET` for padding.
        labels: Label tokens in all micro-batches of the batch and all processes, [], float32.
        share: Share of them that is in this micro-batch, over all processes, [], float32.
    """

    ids: Tensor
    position: Tensor
    example: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    labels: Tensor
    share: Tensor

    @property
    def mask(self) -> Tensor:
        """True for tokens and False for padding, [R, C]."""
        return self.example > 0

    def to(self, device: torch.device) -> Batch:
        """Return a copy on the device. On a GPU the copy is asynchronous."""
        tensors: list[Tensor] = list(vars(self).values())
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]  # a copy from pageable memory waits for the GPU
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Tokenize prompts with their labels.

    As in lm-eval, the label's tokens are those that the text has beyond the tokens of its prompt, and a prompt that is
    too long loses its beginning. A written answer is followed by the end-of-text token. If prompt and label together
    are too long, up to half of `max_length` stays for the prompt and the label loses its end.

    Args:
        tokenizer: Tokenizer of the base model.
        examples: Examples to tokenize.
        max_length: Maximum tokens of an encoded example, prompt and label.

    Raises:
        UserError: There are written answers, and the tokenizer has no end-of-text token. Or the tokenizer does not
            tell texts apart.
    """
    is_written = [isinstance(example, WrittenExample) for example in examples]
    if any(is_written) and tokenizer.eos_token_id is None:
        raise UserError("the base model's tokenizer has no end-of-text token (eos_token) to end a written answer with.")
    texts = encode_texts(tokenizer, [e.prompt + e.label for e in examples])
    prompts = encode_texts(tokenizer, [e.prompt for e in examples])
    encoded = []
    for ends, ids, prompt in zip(is_written, texts, prompts, strict=True):
        context, label = split_label(prompt, ids)
        label = label + [tokenizer.eos_token_id] * ends
        label = label[: max_length - min(len(context), max_length // 2)]
        encoded.append(Encoded((context + label)[-max_length:], len(label)))
    if encoded and (min(len(e.ids) for e in encoded) < 2 or not any(e.label_length for e in encoded)):
        raise UserError(
            "the base model's tokenizer gives whole texts one token or none, and nothing to learn; save it again."
        )
    return encoded


def label_tokens(examples: Sequence[Example], encoded: Sequence[Encoded]) -> dict[str, dict[str, float]]:
    """Count examples, tokens and label tokens per epoch, by task.

    Tasks with classes also have the share of the largest one.
    """
    counts: dict[str, dict[str, float]] = {}
    labels: dict[str, Counter[str]] = {}
    for example, code in zip(examples, encoded, strict=True):
        count = counts.setdefault(example.task, {"examples": 0, "tokens": 0, "label_tokens": 0})
        count["examples"] += 1
        count["tokens"] += len(code.ids)
        count["label_tokens"] += code.label_length
        if getattr(TASKS.get(example.task), "has_classes", False):
            labels.setdefault(example.task, Counter())[example.label] += 1
    for task, of_task in labels.items():
        counts[task]["largest_class"] = max(of_task.values()) / of_task.total()
    return counts


def shuffled_batches(count: int, *, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of all epochs, as indices of the examples.

    Every epoch visits each example once, in a new order. Its last batch may be smaller. The result depends on the
    arguments alone.

    Args:
        count: Number of examples.
        batch_size: Examples per batch.
        epochs: Passes over all examples.
        seed: Seed of the order.
    """
    rng = random.Random(seed)
    batches = []
    for _ in range(epochs):
        order = list(range(count))
        rng.shuffle(order)
        batches += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches


def shapes_of(encoded: Sequence[Encoded], batches: Sequence[Sequence[int]]) -> FixedShapes:
    """Choose the shapes that the micro-batches of a run are padded to, from all its examples and batches."""
    return choose_shapes([len(code.ids) - 1 for code in encoded], [code.label_length for code in encoded], batches)


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    *,
    row_length: int = PACKED_ROW_LENGTH["cuda"],
    max_tokens: int = MAX_TOKENS["cuda"],
    fixed_shapes: FixedShapes | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[Batch]:
    """Pack a batch into micro-batches, each with examples of all lengths.

    The last label token of an example is a target only. Nothing is predicted from it, so it is not part of the input.

    The micro-batches do not depend on the number of processes, because the balance loss of a batch depends on its
    micro-batches. Several processes divide the packed sequences of each micro-batch among themselves. A process that
    gets none has a sequence of padding without targets, because all processes must run equally many passes.

    Args:
        encoded: Examples of the batch.
        pad_id: Token id of padding.
        row_length: Tokens per packed sequence. A longer example gets a multiple of it.
        max_tokens: Maximum tokens per micro-batch; a micro-batch has at least one packed sequence.
        fixed_shapes: Shapes to pad to, so that few CUDA graphs are captured. Padding changes no loss and no gradient.
        process_index: Number of this process, counted from 0.
        num_processes: Processes that divide the batch.
    """
    lengths = [len(code.ids) - 1 for code in encoded]
    total, longest = sum(lengths), max(lengths)
    if fixed_shapes and fixed_shapes.widths:
        width = fixed_shapes.width(total)
        rows = [list(range(len(encoded)))]
    else:
        if total > row_length:
            width = math.ceil(longest / row_length) * row_length
        else:
            # It does not fill one packed sequence.
            width = math.ceil(total / PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
        rows = _pack(lengths, width)
        # A micro-batch needs a token to predict, so a sequence of padding alone must share its micro-batch.
        if fixed_shapes and len(rows) > MAX_UNPADDED_ROWS and max_tokens >= 2 * width:
            rows += [[]] * (-len(rows) % ROWS_MULTIPLE)
    labels = torch.tensor(float(sum(code.label_length for code in encoded)))
    micro_batches = math.ceil(len(rows) / max(1, max_tokens // width))
    min_targets = 0
    if fixed_shapes:
        min_targets = fixed_shapes.labels or math.ceil(len(rows) / micro_batches) * width
    batches = []
    for first in range(micro_batches):
        chosen = rows[first::micro_batches]
        share = torch.tensor(float(sum(encoded[i].label_length for row in chosen for i in row))) / labels
        mine = [[encoded[i] for i in row] for row in chosen[process_index::num_processes]]
        batches.append(_make_micro_batch(mine or [[]], pad_id, width, min_targets, labels, share))
    return batches


def _pack(lengths: list[int], width: int) -> list[list[int]]:
    """Assign examples to sequences of `width` tokens, and return their indices.

    The indices come from first-fit decreasing bin packing.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each sequence
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((place for place, tokens in enumerate(free) if tokens >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(width)
        rows[place].append(i)
        free[place] -= lengths[i]
    return rows


def _make_micro_batch(
    rows: list[list[Encoded]], pad_id: int, width: int, min_targets: int, labels: Tensor, share: Tensor
) -> Batch:
    """Lay the examples of each sequence one after the other, and pad the targets.

    There are at least `min_targets` targets after padding, and no fewer than one.
    """
    ids, position, example = (torch.full((len(rows), width), fill) for fill in (pad_id, 0, 0))
    places = []  # row, column and target of each label token
    for r, codes in enumerate(rows):
        start = 0
        for number, (tokens, label_length) in enumerate(codes, 1):
            end = start + len(tokens) - 1
            ids[r, start:end] = torch.tensor(tokens[:-1])
            position[r, start:end] = torch.arange(end - start)
            example[r, start:end] = number
            places += [(r, end - back, tokens[-back]) for back in range(label_length, 0, -1)]
            start = end
    filled = torch.tensor([(0, 0, IGNORED_TARGET)]).repeat(max(len(places), min_targets, 1), 1)
    filled[: len(places)] = torch.tensor(places, dtype=torch.long).reshape(-1, 3)
    row, column, target = filled.T.contiguous()
    return Batch(ids, position, example, row, column, target, labels, share)
