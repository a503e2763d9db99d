"""Typed fields of a record.

Every data set reads its records with these functions. JSON has texts, numbers, true, false and null, and none of them
stands for another: a null is not the text "None", and true is not the number 1. All functions raise a `ValueError` that
names the field, its value and what is expected; `Task.load` adds the file and the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]  # one record as its publisher wrote it


def text(record: Record, *names: str) -> str:
    """Return the text of a required field. It may be empty.

    Args:
        record: The record.
        names: Name of the field. Further names are its names in other editions of the data set.
    """
    name = names[0] if names[0] in record else next((other for other in names if other in record), names[0])
    return require_text(f"field {name!r}", _get(record, name))


def optional_text(record: Record, name: str) -> str:
    """Return the text of a field that may be missing or null, which gives ""."""
    return "" if record.get(name) is None else text(record, name)


def texts(record: Record, name: str) -> tuple[str, ...]:
    """Return the texts of a field that is a list of them."""
    values = _get(record, name)
    if not isinstance(values, list | tuple):
        raise ValueError(f"field {name!r} is {_show(values)}, not a list of texts")
    return tuple(require_text(f"{name}[{number}]", value) for number, value in enumerate(values))


def truth(record: Record, name: str) -> bool:
    """Return the value of a field that is true or false."""
    value = _get(record, name)
    if not isinstance(value, bool):
        raise ValueError(f"field {name!r} is {_show(value)}, not true or false")
    return value


def index(record: Record, name: str, *, names: Sequence[str] = (), first: int = 0) -> int:
    """Return the index that a field holds as a number, or as a name of the choice.

    A number may be written as a float, because tables with an empty cell have only floats.

    Args:
        record: The record.
        name: Name of the field.
        names: Names of the choices, in order.
        first: Number of the first choice.
    """
    value = _get(record, name)
    if isinstance(value, str) and names:
        return one_of(record, name, names)
    if not is_whole(value) or value < first:
        expected = f"a whole number from {first}" + (f" or one of {', '.join(names)}" if names else "")
        raise ValueError(f"field {name!r} is {_show(value)}, not {expected}")
    return int(value) - first


def one_of(record: Record, name: str, names: Sequence[str]) -> int:
    """Return the index of a field's text among some names."""
    value = text(record, name)
    if list(names).count(value) != 1:
        raise ValueError(f"field {name!r} is {_show(value)}, not one of {', '.join(names)}")
    return list(names).index(value)


def is_whole(value: object) -> bool:
    """Return True for a number without a fraction; true and false are no numbers."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def require_text(what: str, value: object) -> str:
    """Return the value if it is a text that can be written as UTF-8.

    Args:
        what: Name of the value in the error message.
        value: The value.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_show(value)}, not a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} has half of a surrogate pair, which is no character: {_show(value)}") from None
    return value


def require_filled(what: str, value: object) -> str:
    """Return the value if it is a text with more than white space."""
    if not require_text(what, value).strip():
        raise ValueError(f"{what} is empty")
    return str(value)


def _get(record: Record, name: str) -> Any:
    if name not in record:
        raise ValueError(f"field {name!r} is missing; there are {', '.join(record) or 'no fields'}")
    return record[name]


def _show(value: object) -> str:
    """Return a value as JSON calls it, at most 60 characters of it."""
    known = {None: "null", True: "true", False: "false"}
    return known[value] if value is None or isinstance(value, bool) else ascii(value)[:60]
