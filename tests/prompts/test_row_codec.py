import datetime

import pyarrow as pa

from rlhf_ray.prompts.row_codec import ROW_COLUMN, decode_row, encode_rows


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
