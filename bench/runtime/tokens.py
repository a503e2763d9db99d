"""Tokenize texts alike for training and scoring.

Many tokenizers put special tokens around a text. A token in front (BOS) belongs to what the base model has learned, so
it is kept. A token behind (EOS) would stand between a prompt and its label, so it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return each text's token ids, with the tokenizer's special tokens in front only.

    They are not repeated in front of a text that already begins with them.
    """
    if not texts:
        return []
    front = _special_tokens_in_front(tokenizer)
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [ids if ids[: len(front)] == front else front + ids for ids in encoded]


def split_label(prompt: list[int], text: list[int]) -> tuple[list[int], list[int]]:
    """Split the tokens of a prompt with its label, as lm-eval does.

    The label's tokens are those that the text has beyond the number of its prompt's.

    Args:
        prompt: Token ids of the prompt alone.
        text: Token ids of the prompt and its label, encoded as one text.
    """
    return text[: len(prompt)], text[len(prompt) :]


def _special_tokens_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    is_special: list[int] = encoded["special_tokens_mask"]
    return ids[: is_special.index(0)] if 0 in is_special else []
