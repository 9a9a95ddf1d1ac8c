"""The forms that a row's answer may have, the same for every reward that reads one."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from rlhf_ray.errors import DataError
from rlhf_ray.untrusted_text import shortened

__all__ = ["GoldAnswer", "gold_answers", "number_text"]

GoldAnswer: TypeAlias = str | Decimal
"""A text, stripped and not empty, or the exact value of a number."""


def gold_answers(value: object, column: str) -> tuple[GoldAnswer, ...]:
    """The answers that a row accepts: one text or number, or each of a list, tuple or one-dimensional array.

    Args:
        value: What the row holds.
        column: The name of its column, for messages.

    Raises:
        DataError: It is empty, null, not finite, a boolean, a mapping, a nested list, or of another type.
    """
    if hasattr(value, "as_py"):  # a pyarrow scalar
        value = value.as_py()
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1:
        listed: list[Any] = list(value)  # type: ignore[call-overload]
        if not listed:
            raise _refused(column, value, "is an empty list")
        return tuple(_gold_answer(item, column) for item in listed)
    return (_gold_answer(value, column),)


def number_text(number: Decimal) -> str:
    """The plain decimal digits of a number: ``12`` for 12.0, never an exponent."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _gold_answer(item: object, column: str) -> GoldAnswer:
    if isinstance(item, str):
        if not item.strip():
            raise _refused(column, item, "is empty")
        return item.strip()
    if isinstance(item, Mapping):
        raise _refused(column, item, "is a mapping: give the text or number inside it a column of its own")
    if isinstance(item, bool):
        raise _refused(column, item, "is a boolean: write the answer as the text that completions are to have")
    number = _number(item)
    if number is None:
        kind = "null" if item is None else f"of type {type(item).__name__}"
        raise _refused(column, item, f"is {kind}, not a text, a number or a list of those")
    if not number.is_finite():
        raise _refused(column, item, "is not a finite number")
    return number


def _number(item: object) -> Decimal | None:
    if isinstance(item, numbers.Integral):
        return Decimal(int(item))
    if isinstance(item, (numbers.Real, Decimal)):
        try:
            return Decimal(str(item))
        except InvalidOperation:  # a Fraction
            return None
    return None


def _refused(column: str, value: object, reason: str) -> DataError:
    return DataError(f"the row's {column!r} {reason} ({shortened(repr(value), 80)})")
