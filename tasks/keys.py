"""Normalized texts. Items with equal ones are duplicates."""

from __future__ import annotations

import re
import unicodedata


def normalize(text: str) -> str:
    """Return a text's lower-case letters and digits of all scripts, with one space between words.

    A text without any, such as a line of symbols, is returned without surrounding white space.
    """
    if text.isascii():
        return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip() or text.strip()
    text = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)  # letters, marks, numbers
    return " ".join(kept.split()) or text.strip()


def letters_and_digits(text: str) -> str:
    """Return a text's English letters in lower case and its digits, without anything between them.

    Editions of one sentence differ in the blanks that a tokenizer sets and in accented letters. A text without any
    English letter is normalized instead.
    """
    return re.sub(r"[^a-z0-9]+", "", text.lower()) or normalize(text)
