"""prompts/: JSON files -> rows, each exactly what ``json.loads`` makes of it.

Arrow's JSON reader, which ``ray.data.read_json`` uses, makes dates of strings that look like one, refuses a key whose
type differs between rows, and does not say which line is broken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import IO, Any

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.row_codec import Row

__all__ = ["json_rows"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_rows(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Parse JSON lines, or one JSON array of objects.

    Args:
        stream: The decompressed file, in UTF-8.
        name: What to call the file in an error.

    Yields:
        The rows in order.

    Raises:
        DataError: A line is not JSON, not UTF-8 or not an object; names the line.
    """
    lines = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line for number, line in enumerate(stream, 1))
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip().startswith(b"["):
        yield from _array_rows(b"".join(line for _, line in itertools.chain([first], numbered)), name)
        return
    for number, line in itertools.chain([first], numbered):
        yield _object(_parse(line, f"{name}, line {number}"), f"{name}, line {number}")


def _array_rows(text: bytes, name: str) -> Iterator[Row]:
    for index, value in enumerate(_parse(text, name)):
        yield _object(value, f"{name}, element {index}")


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as failure:  # ValueError: both a JSON error and a Unicode error
        raise DataError(f"{where}: not JSON: {failure}") from failure


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be an object like {{...}}, not a {type(value).__name__}")
    return value
