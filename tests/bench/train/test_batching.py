import torch

from bench.models import tiny
from bench.train.batching import Encoded, collate, encode, label_tokens, schedule
from tasks import Example, WrittenExample

EXAMPLES = [
    Example("majority", "Passage: red blue\nQuestion: which is most often ?\nAnswer:", (" red", " blue"), 0),
    Example("second", "Question: which is second ?\nAnswer:", (" A", " B in spring"), 1),
]


def test_the_label_is_what_the_prompt_does_not_have():
    encoded = encode(tiny.tokenizer(), EXAMPLES, max_length=100)
    assert [code.label_length for code in encoded] == [1, 3]
    assert tiny.tokenizer().decode(encoded[1].ids[-3:]) == "B in spring"
    assert label_tokens(EXAMPLES, encoded)["second"] == {"examples": 1, "tokens": 9, "label_tokens": 3}


def test_a_prompt_that_is_too_long_loses_its_beginning():
    whole, cut = (encode(tiny.tokenizer(), EXAMPLES, max_length=n)[0] for n in (100, 5))
    assert cut == Encoded(whole.ids[-5:], 1)


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    batches = schedule(530, batch_size=8, epochs=2, seed=0)
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(530))
        assert [len(batch) for batch in epoch] == [8] * 66 + [2]
    assert batches[:half] != batches[half:]
    assert batches == schedule(530, batch_size=8, epochs=2, seed=0)
    assert batches != schedule(530, batch_size=8, epochs=2, seed=1)


def test_a_row_holds_examples_one_after_the_other():
    (batch,) = collate([Encoded([9, 10], 1), Encoded([5, 6, 7, 8], 2)], pad_id=0)
    assert batch.ids[:, :6].tolist() == [[5, 6, 7, 9, 0, 0]] and batch.ids.shape == (1, 64)
    assert batch.position[:, :6].tolist() == [[0, 1, 2, 0, 0, 0]]
    assert batch.example[:, :6].tolist() == [[1, 1, 1, 2, 0, 0]]
    assert batch.mask.sum() == 4
    assert list(zip(batch.row.tolist(), batch.column.tolist(), batch.target.tolist(), strict=True)) == [
        (0, 1, 7), (0, 2, 8), (0, 3, 10),
    ]  # fmt: skip
    assert batch.labels.item() == 3


def test_a_token_sees_what_stands_before_it_in_its_example():
    (batch,) = collate([Encoded([5, 6, 7, 8], 2), Encoded([9, 10, 11], 1)], pad_id=0)
    sees = (batch.attention_bias(torch.float32)[0, 0, :6, :6] == 0).int().tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_rows_have_little_padding_and_large_batches_come_in_parts():
    encoded = [Encoded(list(range(20 + i * 37 % 200)), 1) for i in range(64)]
    tokens = sum(len(code.ids) - 1 for code in encoded)
    (whole,) = collate(encoded, pad_id=0, row=512)
    assert whole.ids.shape[1] == 512 and whole.mask.sum() == tokens > 0.9 * whole.ids.numel()
    (even,) = collate(encoded, pad_id=0, row=512, fixed_shapes=True)
    assert len(whole.ids) % 2 == 1 and len(even.ids) == len(whole.ids) + 1 and even.mask.sum() == tokens
    parts = collate(encoded, pad_id=0, row=512, max_tokens=4096)
    assert all(part.ids.numel() <= 4096 and part.labels.item() == 64 for part in parts) and len(parts) > 1
    assert sum(len(part.target) for part in parts) == 64
    longest = [max(part.position.max().item() for part in parts), min(part.position.max().item() for part in parts)]
    assert longest[0] - longest[1] < 40  # parts are alike
    recurring = collate(encoded, pad_id=0, row=512, max_tokens=4096, fixed_shapes=True)
    assert {len(part.target) for part in recurring} == {64} and len({part.ids.shape for part in recurring}) == 1
    (long,) = collate([Encoded(list(range(600)), 1), *encoded], pad_id=0, row=512)
    assert long.ids.shape[1] == 1024


WRITTEN = WrittenExample("counting", "Question: say it .\nAnswer:", (" 1 2 3",), 0, ("3",))


def test_what_is_written_ends_with_the_token_that_ends_a_text():
    words = tiny.tokenizer()
    (code,) = encode(words, [WRITTEN], max_length=100)
    assert code.ids[-4:] == [*words(" 1 2 3")["input_ids"], words.eos_token_id] and code.label_length == 4


def test_a_label_that_is_too_long_leaves_half_of_the_room_to_its_prompt():
    words = tiny.tokenizer()
    (code,) = encode(words, [WRITTEN], max_length=6)
    assert words.decode(code.ids) == "it . Answer: 1 2 3" and code.label_length == 3  # and no end, which is not there
    (code,) = encode(words, [WRITTEN], max_length=4)
    assert words.decode(code.ids) == ". Answer: 1 2" and code.label_length == 2


def test_where_shapes_must_recur_labels_are_padded_to_every_position():
    encoded = [Encoded([5, 6, 7, 8], 2), Encoded([9, 10], 1)]
    (plain,), (padded,) = collate(encoded, 0), collate(encoded, 0, fixed_shapes=True)
    assert len(padded.target) == padded.ids.numel()
    real = padded.target != -100
    for name in ("row", "column", "target"):
        assert getattr(padded, name)[real].tolist() == getattr(plain, name).tolist()
    assert padded.labels == plain.labels == 3
    (one,) = collate([Encoded([9, 10], 1)] * 2, 0, fixed_shapes=True)
    assert len(one.target) == 2  # a label of one token each is of one shape as it is
