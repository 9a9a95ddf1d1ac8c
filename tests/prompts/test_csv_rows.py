from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.csv_rows import csv_rows
from rlhf_ray.prompts.source import find_eval_source, find_source

CELLS = ["007", "1.50", "true", "NA", "2024-01-01", "1e5", " ", "null", "", "NaN", "12:30", "0x1F", "-0", " 7 "]


def rows_of(text: str, **csv_types: str) -> list[dict[str, Any]]:
    return list(csv_rows(io.BufferedReader(io.BytesIO(text.encode())), "data.csv", csv_types))


@pytest.mark.parametrize("cell", CELLS)
def test_a_column_whose_cells_all_look_alike_stays_text(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\n" + f"{cell},{json.dumps(cell)}\n" * 3)
    expected = [{"prompt": cell, "answer": cell}] * 3
    assert find_source(DataSettings(path=str(path))).sample(9) == expected
    assert find_eval_source(DataSettings(path=str(path)), field="data.eval_path").sample(9) == expected


def test_columns_that_are_named_get_their_type() -> None:
    text = "prompt,n,x,flag,id\n7,007,1e5,true,007\n8,,,,\n9,-3,0.5,0,x\n"
    assert rows_of(text, n="int", x="float", flag="bool") == [
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
        rows_of(text, **csv_types)


def test_headers_with_a_byte_order_mark_quotes_and_line_breaks() -> None:
    assert rows_of('\ufeff"the\nprompt","a, b"\r\n1,2\r\n') == [{"the\nprompt": "1", "a, b": "2"}]
    assert rows_of("prompt,answer\n") == []
