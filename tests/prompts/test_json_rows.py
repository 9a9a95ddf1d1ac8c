import io

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.json_rows import json_rows


def parse(text: str | bytes) -> list[dict[str, object]]:
    data = text.encode() if isinstance(text, str) else text
    return list(json_rows(io.BytesIO(data), "data.jsonl"))


def test_values_stay_what_the_file_says() -> None:
    rows = parse('{"answer": "2021-05-01", "tags": ["a", 1, null]}\n{"answer": 7, "meta": {"k": 1.5}}\n')
    assert rows == [{"answer": "2021-05-01", "tags": ["a", 1, None]}, {"answer": 7, "meta": {"k": 1.5}}]


def test_blank_lines_byte_order_mark_and_a_missing_last_newline() -> None:
    assert parse(b'\xef\xbb\xbf\n{"a": 1}\n\n  \n{"a": "\xc3\xa9"}') == [{"a": 1}, {"a": "é"}]


def test_an_array_of_objects() -> None:
    assert parse('\n [\n {"a": 1},\n {"a": 2}\n]') == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_nothing_in_the_file_is_no_rows(text: str) -> None:
    assert parse(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1}\n\n{"a": 2\n', r"data\.jsonl, line 3: not JSON: Expecting ',' delimiter"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"data\.jsonl, line 2: not JSON: 'utf-8' codec"),
        (b'{"a": 1}\n"text"\n', r"data\.jsonl, line 2: a row must be an object like \{\.\.\.\}, not a str"),
        (b'[{"a": 1}, 5]', r"data\.jsonl, element 1: a row must be an object like \{\.\.\.\}, not a int"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", r"data\.jsonl, line 1: not JSON: "),
        (b'[{"a": 1}', r"data\.jsonl: not JSON: "),
    ],
)
def test_what_is_broken_is_named_with_its_line(text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text)
