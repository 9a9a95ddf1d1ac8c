import datetime
import json

import numpy as np
import pyarrow as pa
import pytest

from rlhf_ray.prompts.rows import RowTable, arrow_rows, decode_rows, encoded_blocks


def test_rows_of_different_keys_and_types_come_back_as_they_were() -> None:
    rows = [
        {"prompt": "a", "meta": {"x": [1, {"y": None}]}},
        {"prompt": ["b"], "date": datetime.date(2024, 1, 2), "score": 1},
        {"prompt": None, "score": "high"},
    ]
    [block] = encoded_blocks(iter(rows))
    assert decode_rows(block) == rows
    assert block.schema.types == [pa.large_binary()]


def test_rows_come_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.prompts.rows._BLOCK_ROWS", 2)
    blocks = [decode_rows(block) for block in encoded_blocks(iter([{"n": n} for n in range(5)]))]
    assert blocks == [[{"n": 0}, {"n": 1}], [{"n": 2}, {"n": 3}], [{"n": 4}]]
    assert list(encoded_blocks(iter([]))) == []


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> RowTable:
    """Rows 0 to 4 in blocks of 2 and 3, with empty blocks around them; blocks stand for their references."""
    import ray

    monkeypatch.setattr(ray, "get", lambda block: block)
    [first], [second] = (list(encoded_blocks({"n": n} for n in part)) for part in (range(2), range(2, 5)))
    return RowTable([None, first, None, second, None], [0, 2, 0, 3, 0])  # type: ignore[list-item]


@pytest.mark.parametrize("numbers", [[4, 0, 1, 2], [3], [2, 2], []])
def test_rows_are_found_between_empty_blocks(table: RowTable, numbers: list[int]) -> None:
    assert table.num_rows == 5
    assert table.take(np.array(numbers, dtype=np.int64)) == [{"n": n} for n in numbers]


def test_a_table_without_rows() -> None:
    assert RowTable([], []).num_rows == 0


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
