"""Tokenized examples, the order of training, and packed batches."""

import pytest
import torch

from bench.models import tiny
from bench.train.batching import Encoded, collate, encode, label_tokens, shuffled_batches
from bench.train.fixed_shapes import FixedShapes
from tasks import Example, WrittenExample

EXAMPLES = [
    Example("majority", "Passage: red blue\nQuestion: which is most often ?\nAnswer:", (" red", " blue"), 0),
    Example("second", "Question: which is second ?\nAnswer:", (" A", " B in spring"), 1),
]


def test_a_label_is_the_tokens_beyond_the_prompt():
    encoded = encode(tiny.tokenizer(), EXAMPLES, max_length=100)
    assert [code.label_length for code in encoded] == [1, 3]
    assert tiny.tokenizer().decode(encoded[1].ids[-3:]) == "B in spring"
    assert label_tokens(EXAMPLES, encoded)["second"] == {"examples": 1, "tokens": 9, "label_tokens": 3}


def test_a_prompt_that_is_too_long_loses_its_beginning():
    intact, cut = (encode(tiny.tokenizer(), EXAMPLES, max_length=n)[0] for n in (100, 5))
    assert cut == Encoded(intact.ids[-5:], 1)


def test_every_epoch_visits_each_example_once_in_a_new_order():
    batches = shuffled_batches(530, batch_size=8, epochs=2, seed=0)
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(530))
        assert [len(batch) for batch in epoch] == [8] * 66 + [2]
    assert batches[:half] != batches[half:]
    assert batches == shuffled_batches(530, batch_size=8, epochs=2, seed=0)
    assert batches != shuffled_batches(530, batch_size=8, epochs=2, seed=1)


def test_examples_are_packed_one_after_the_other():
    (batch,) = collate([Encoded([9, 10], 1), Encoded([5, 6, 7, 8], 2)], pad_id=0)
    assert batch.ids[:, :6].tolist() == [[5, 6, 7, 9, 0, 0]] and batch.ids.shape == (1, 64)
    assert batch.position[:, :6].tolist() == [[0, 1, 2, 0, 0, 0]]
    assert batch.example[:, :6].tolist() == [[1, 1, 1, 2, 0, 0]]
    assert batch.mask.sum() == 4
    assert list(zip(batch.row.tolist(), batch.column.tolist(), batch.target.tolist(), strict=True)) == [
        (0, 1, 7), (0, 2, 8), (0, 3, 10),
    ]  # fmt: skip
    assert batch.labels.item() == 3


def test_packing_leaves_little_padding_and_large_batches_are_split():
    encoded = [Encoded(list(range(20 + i * 37 % 200)), 1) for i in range(64)]
    tokens = sum(len(code.ids) - 1 for code in encoded)
    (single,) = collate(encoded, pad_id=0, row_length=512)
    assert single.ids.shape[1] == 512 and single.mask.sum() == tokens > 0.9 * single.ids.numel()
    (even,) = collate(encoded, pad_id=0, row_length=512, fixed_shapes=FixedShapes(labels=64))
    assert len(single.ids) % 2 == 1 and len(even.ids) == len(single.ids) + 1 and even.mask.sum() == tokens
    split = collate(encoded, pad_id=0, row_length=512, max_tokens=4096)
    assert all(one.ids.numel() <= 4096 and one.labels.item() == 64 for one in split) and len(split) > 1
    assert sum(len(one.target) for one in split) == 64
    longest = [one.position.max().item() for one in split]
    assert max(longest) - min(longest) < 40  # each has examples of all lengths
    fixed = collate(encoded, pad_id=0, row_length=512, max_tokens=4096, fixed_shapes=FixedShapes(labels=64))
    assert {len(one.target) for one in fixed} == {64} and len({one.ids.shape for one in fixed}) == 1
    (long,) = collate([Encoded(list(range(600)), 1), *encoded], pad_id=0, row_length=512)
    assert long.ids.shape[1] == 1024


WRITTEN = WrittenExample("counting", "Question: say it .\nAnswer:", (" 1 2 3",), 0, ("3",))


def test_a_written_answer_ends_with_the_end_of_text_token():
    tokenizer = tiny.tokenizer()
    (code,) = encode(tokenizer, [WRITTEN], max_length=100)
    assert code.ids[-4:] == [*tokenizer(" 1 2 3")["input_ids"], tokenizer.eos_token_id] and code.label_length == 4


def test_a_long_label_leaves_half_of_the_length_to_its_prompt():
    tokenizer = tiny.tokenizer()
    (code,) = encode(tokenizer, [WRITTEN], max_length=6)
    # The end-of-text token is cut off.
    assert tokenizer.decode(code.ids) == "it . Answer: 1 2 3" and code.label_length == 3
    (code,) = encode(tokenizer, [WRITTEN], max_length=4)
    assert tokenizer.decode(code.ids) == ". Answer: 1 2" and code.label_length == 2


def test_fixed_shapes_pad_labels_to_the_number_of_tokens():
    encoded = [Encoded([5, 6, 7, 8], 2), Encoded([9, 10], 1)]
    (unpadded,), (padded,) = collate(encoded, 0), collate(encoded, 0, fixed_shapes=FixedShapes())
    assert len(padded.target) == padded.ids.numel()
    real = padded.target != -100
    for name in ("row", "column", "target"):
        assert getattr(padded, name)[real].tolist() == getattr(unpadded, name).tolist()
    assert padded.labels == unpadded.labels == 3


def test_processes_divide_each_micro_batch():
    """Together they have its sequences, and a process without one has padding without targets."""
    encoded = [Encoded(list(range(1, 40 + 9 * i)), 1 + i) for i in range(8)]
    options = {"pad_id": 0, "row_length": 128, "max_tokens": 256}
    alone = collate(encoded, **options)
    assert len(alone) == 3 and [len(one.ids) for one in alone] == [2, 2, 1]
    shared = [collate(encoded, **options, process_index=i, num_processes=3) for i in range(3)]
    assert sum(one.share.item() for one in alone) == pytest.approx(1)
    for whole, parts in zip(alone, zip(*shared, strict=True), strict=True):
        filled, empty = parts[: len(whole.ids)], parts[len(whole.ids) :]
        assert torch.equal(torch.cat([part.ids for part in filled]), whole.ids)
        assert torch.cat([part.target for part in filled]).tolist() == whole.target.tolist()
        assert {part.labels.item() for part in parts} == {whole.labels.item()} == {sum(range(1, 9))}
        assert {part.share.item() for part in parts} == {whole.share.item()}
        for part in empty:
            assert part.target.tolist() == [-100] and not part.mask.any() and part.ids.shape == (1, 128)
