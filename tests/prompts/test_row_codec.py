import datetime
import json

import numpy as np
import pyarrow as pa

from rlhf_ray.prompts.row_codec import ROW_COLUMN, arrow_rows, decode_row, encode_rows


def test_rows_of_different_keys_and_types_come_back_as_they_were() -> None:
    rows = [
        {"prompt": "a", "meta": {"x": [1, {"y": None}]}},
        {"prompt": ["b"], "date": datetime.date(2024, 1, 2), "score": 1},
        {"prompt": None, "score": "high"},
    ]
    assert [decode_row(data) for data in encode_rows(rows)[ROW_COLUMN].to_pylist()] == rows


def test_no_rows_still_make_a_table_of_the_same_schema() -> None:
    assert encode_rows([]).schema == encode_rows([{"a": 1}]).schema
    assert encode_rows([]).schema.types == [pa.large_binary()]


def test_arrow_pads_nested_values_alone() -> None:
    rows = [
        {"prompt": "a", "meta": {"x": {"y": 1}}, "calls": [{"f": "g", "arguments": {"a": 1}}, None], "score": None},
        {"prompt": "b", "meta": {"x": {"z": "2"}}, "calls": [{"arguments": {"b": [None, 2]}}], "score": 1.5},
        {"prompt": "c", "meta": {}, "calls": [], "score": None},
        {"prompt": "d", "meta": None, "calls": None, "score": 2.0},
    ]
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist() != rows
    assert arrow_rows(table) == rows
    assert [row for batch in table.to_batches(max_chunksize=1) for row in arrow_rows(batch)] == rows


def test_a_key_without_any_value_is_no_padding_unless_it_is_in_a_message() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    chat = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    [row] = arrow_rows(pa.Table.from_pylist([{"prompt": chat, "meta": {"a": [{"s": None}]}}]))
    assert row["meta"] == {"a": [{"s": None}]}
    assert row["prompt"][0]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


def test_what_arrow_holds_as_text_or_pairs_is_what_it_stands_for() -> None:
    written = [{"a": 1, "b": None}, "x", None]
    as_json = pa.array([json.dumps(value) for value in written[:2]] + [None], pa.json_())
    pairs = pa.array([[("k", 1), ("l", None)], [], None], pa.map_(pa.string(), pa.int64()))
    rows = arrow_rows(pa.table({"json": as_json, "pairs": pairs}))
    assert [row["json"] for row in rows] == written
    assert [row["pairs"] for row in rows] == [{"k": 1, "l": None}, {}, None]


def test_pickled_objects_of_a_ray_dataset_hold_no_numpy() -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    given = {"content": "a", "calls": np.array([{"n": np.int64(3), "ids": np.arange(2)}, None], dtype=object)}
    table = pa.table({"prompt": ArrowPythonObjectArray.from_objects([[given]])})
    [row] = arrow_rows(table)
    assert json.dumps(row) == '{"prompt": [{"content": "a", "calls": [{"n": 3, "ids": [0, 1]}, null]}]}'
