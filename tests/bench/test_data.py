import torch

from bench import tiny
from bench.data import GPU_WIDTHS, Encoded, collate, encode, label_tokens, schedule
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


def test_an_epoch_sees_every_example_once_in_batches_of_like_length():
    lengths = [5 + i * 37 % 100 for i in range(530)]
    batches = schedule(lengths, batch_size=8, epochs=2, seed=0)
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(530))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches if len(b) == 8]
    assert sum(spread) / len(spread) < 10  # of lengths from 5 to 104
    assert batches == schedule(lengths, batch_size=8, epochs=2, seed=0)
    assert batches != schedule(lengths, batch_size=8, epochs=2, seed=1)


def test_collate_places_every_label_token():
    (batch,) = collate([Encoded([5, 6, 7, 8], 2), Encoded([9, 10], 1)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert list(zip(batch.row.tolist(), batch.column.tolist(), batch.target.tolist(), strict=True)) == [
        (0, 1, 7), (0, 2, 8), (1, 0, 10),
    ]  # fmt: skip
    assert batch.labels.item() == 3


def test_large_batches_come_in_equal_parts_of_few_widths():
    encoded = [Encoded(list(range(300)), 1)] * 64
    parts = collate(encoded, pad_id=0, widths=GPU_WIDTHS)
    assert [part.ids.shape for part in parts] == [torch.Size([32, 320])] * 2
    assert all(part.labels.item() == 64 for part in parts)
    (wide,) = collate([Encoded(list(range(600)), 1)], pad_id=0, widths=GPU_WIDTHS)
    assert wide.ids.shape == (1, 1024)


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
    (plain,), (padded,) = collate(encoded, 0), collate(encoded, 0, widths=(8,))
    assert len(padded.target) == padded.ids.numel()
    real = padded.target != -100
    for name in ("row", "column", "target"):
        assert getattr(padded, name)[real].tolist() == getattr(plain, name).tolist()
    assert padded.labels == plain.labels == 3
    (one,) = collate([Encoded([9, 10], 1)] * 2, 0, widths=(8,))
    assert len(one.target) == 2  # a label of one token each is of one shape as it is
