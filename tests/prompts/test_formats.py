from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import json as arrow_json
from pyarrow import parquet

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.formats import csv_rows, file_format, file_rows, json_rows
from rlhf_ray.prompts.sources import find_source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.JSONL", True),
        ("a.json", True),
        ("a.ndjson.zst", True),
        ("a.csv.gz", True),
        ("a.parquet", True),
        ("a.parquet.gz", False),
        ("a.txt", False),
        ("a.gz", False),
        ("jsonl", False),
    ],
)
def test_known_names(name: str, expected: bool) -> None:
    assert (file_format(Path(name)) is not None) is expected


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(file_rows(path, {}))


def test_compressed_json(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert rows_of(path) == [{"prompt": "a"}]


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,answer\n007,1\n"two\nlines, one ""prompt""",2\n')
    assert rows_of(path) == [
        {"prompt": "007", "answer": "1"},
        {"prompt": 'two\nlines, one "prompt"', "answer": "2"},
    ]


def test_parquet_keeps_nested_columns(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "meta": {"tags": ["x", "y"]}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert rows_of(tmp_path / "data.parquet") == rows


def tool_call(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]}


def test_parquet_pads_no_nested_value_and_json_keeps_its_nulls(tmp_path: Path) -> None:
    rows = [tool_call(a=1), tool_call(b=[{"c": 1}, {"d": "x"}]), tool_call(b=[{"c": 2}, None])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert rows_of(tmp_path / "data.parquet") == rows
    written = [tool_call(a=1, b=None)]
    (tmp_path / "data.jsonl").write_text(json.dumps(written[0]))
    assert rows_of(tmp_path / "data.jsonl") == written


def test_what_arrow_infers_and_this_reader_does_not(tmp_path: Path) -> None:
    """The reason for a JSON reader of our own; should Arrow change, ``ray.data.read_json`` would do."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "2024-01-02"}\n')
    assert arrow_json.read_json(str(path)).to_pylist() != [{"prompt": "2024-01-02"}]
    assert rows_of(path) == [{"prompt": "2024-01-02"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.parquet", b"not parquet at all", r"data\.parquet: cannot be read: "),
        ("data.csv", b"", r"data\.csv: cannot be read: Empty CSV file"),
        ("data.csv", b"prompt,answer\na,1,2\n", r"data\.csv: cannot be read: .*Expected 2 columns, got 3"),
        ("data.jsonl.gz", b"not gzip at all", r"data\.jsonl\.gz: cannot be read: "),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


# JSON.


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


# CSV.

CELLS = ["007", "1.50", "true", "NA", "2024-01-01", "1e5", " ", "null", "", "NaN", "12:30", "0x1F", "-0", " 7 "]


def csv_of(text: str, **csv_types: str) -> list[dict[str, Any]]:
    return list(csv_rows(io.BufferedReader(io.BytesIO(text.encode())), "data.csv", csv_types))


@pytest.mark.parametrize("cell", CELLS)
def test_a_column_whose_cells_all_look_alike_stays_text(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\n" + f"{cell},{json.dumps(cell)}\n" * 3)
    expected = [{"prompt": cell, "answer": cell}] * 3
    assert find_source(DataSettings(path=str(path))).sample(9) == expected


def test_columns_that_are_named_get_their_type() -> None:
    text = "prompt,n,x,flag,id\n7,007,1e5,true,007\n8,,,,\n9,-3,0.5,0,x\n"
    assert csv_of(text, n="int", x="float", flag="bool") == [
        {"prompt": "7", "n": 7, "x": 1e5, "flag": True, "id": "007"},
        {"prompt": "8", "n": None, "x": None, "flag": None, "id": ""},
        {"prompt": "9", "n": -3, "x": 0.5, "flag": False, "id": "x"},
    ]


@pytest.mark.parametrize(
    ("text", "csv_types", "message"),
    [
        ("prompt,n\na,1\nb,1.5\n", {"n": "int"}, r"data\.csv, row 1 \(from 0\): column 'n' holds '1\.5', .* no int"),
        ("prompt,n\na,NA\n", {"n": "float"}, r"row 0 \(from 0\): column 'n' holds 'NA', which is no float"),
        ("prompt,n\na,yes\n", {"n": "bool"}, r"column 'n' holds 'yes', which is no bool"),
        ("prompt,n\na,1\n", {"m": "int"}, r"data\.csv has no column 'm', which data\.csv_types names; .*'prompt', 'n'"),
        ("a,b,a\n1,2,3\n", {}, r"names column 'a' more than once"),
        ("\n\n", {}, "Empty CSV file"),
    ],
)
def test_what_is_wrong_is_named(text: str, csv_types: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv_of(text, **csv_types)


def test_headers_with_a_byte_order_mark_quotes_and_line_breaks() -> None:
    assert csv_of('\ufeff"the\nprompt","a, b"\r\n1,2\r\n') == [{"the\nprompt": "1", "a, b": "2"}]
    assert csv_of("prompt,answer\n") == []
