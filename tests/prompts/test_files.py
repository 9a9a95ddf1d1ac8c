import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import json as arrow_json
from pyarrow import parquet

from rlhf_ray.errors import DataError
from rlhf_ray.prompts import files
from rlhf_ray.prompts.files import FileSource, is_data_file


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
    assert is_data_file(Path(name)) is expected


def source(*paths: Path) -> FileSource:
    return FileSource.from_paths(list(paths), {})


def test_a_sample_is_the_start_of_the_files_in_order(tmp_path: Path) -> None:
    for number in (1, 2):
        rows = [{"prompt": f"{number}.{i}"} for i in range(3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = source(tmp_path / "2.jsonl", tmp_path / "1.jsonl")
    assert [row["prompt"] for row in both.sample(4)] == ["2.0", "2.1", "2.2", "1.0"]
    assert both.name == "2.jsonl and 1 more"


def test_a_broken_line_beyond_the_sample_is_found(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n' * 40 + "{broken\n")
    with pytest.raises(DataError, match=r"data\.jsonl, line 41: not JSON"):
        source(path).sample(3)


def test_a_check_of_a_huge_file_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PARSED_ROWS", 10)
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n' * 40 + "{broken\n")
    assert len(source(path).sample(3)) == 3


def test_compressed_json(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert source(path).sample(5) == [{"prompt": "a"}]


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,answer\n007,1\n"two\nlines, one ""prompt""",2\n')
    assert source(path).sample(5) == [
        {"prompt": "007", "answer": "1"},
        {"prompt": 'two\nlines, one "prompt"', "answer": "2"},
    ]


def test_parquet_keeps_nested_columns(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "meta": {"tags": ["x", "y"]}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert source(tmp_path / "data.parquet").sample(5) == rows


def tool_call(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]}


def test_parquet_pads_no_nested_value_and_json_keeps_its_nulls(tmp_path: Path) -> None:
    rows = [tool_call(a=1), tool_call(b=[{"c": 1}, {"d": "x"}]), tool_call(b=[{"c": 2}, None])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert source(tmp_path / "data.parquet").sample(5) == rows
    written = [tool_call(a=1, b=None)]
    (tmp_path / "data.jsonl").write_text(json.dumps(written[0]))
    assert source(tmp_path / "data.jsonl").sample(5) == written


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
        source(tmp_path / name).sample(1)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def chosen(folder: Path, split: str = "train") -> list[str]:
    found = FileSource.from_folder(folder, {}, split=split)
    return [str(file.relative_to(folder)) for file in found.files]


def test_a_folder_is_its_data_files_sorted(tmp_path: Path) -> None:
    write(
        tmp_path,
        "b.jsonl",
        "a.jsonl",
        "sub/c.jsonl",
        "README.md",
        ".hidden.jsonl",
        "_tmp/d.jsonl",
        "dataset_infos.json",
    )
    assert chosen(tmp_path) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_names_that_tell_splits_apart_keep_test_rows_out_of_training(tmp_path: Path) -> None:
    write(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "dev.jsonl")
    assert chosen(tmp_path, "train") == ["data/train-00000-of-00001.jsonl"]
    assert chosen(tmp_path, "test") == ["data/test-00000-of-00001.jsonl"]
    assert chosen(tmp_path, "validation") == ["dev.jsonl"]
    with pytest.raises(
        DataError, match="holds files of split test and train and validation, but none of split 'other'"
    ):
        chosen(tmp_path, "other")


def test_the_folders_own_name_tells_no_split(tmp_path: Path) -> None:
    write(tmp_path / "test", "a.jsonl", "contrastive.jsonl")
    assert chosen(tmp_path / "test", "train") == ["a.jsonl", "contrastive.jsonl"]


def test_folders_and_lists_that_cannot_be_one_dataset(tmp_path: Path) -> None:
    write(tmp_path, "a/one.jsonl", "a/two.csv", "b/notes.txt")
    with pytest.raises(DataError, match=r"several formats \(csv, json\)"):
        chosen(tmp_path / "a")
    with pytest.raises(DataError, match="holds no data file"):
        chosen(tmp_path / "b")
    with pytest.raises(DataError, match="is a folder; a list"):
        source(tmp_path / "a")
    with pytest.raises(DataError, match=r"notes\.txt: not a data file; a name must end in \.jsonl"):
        source(tmp_path / "b/notes.txt")


def test_what_arrow_infers_and_this_reader_does_not(tmp_path: Path) -> None:
    """The reason for a JSON reader of our own; should Arrow change, ``ray.data.read_json`` would do."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "2024-01-02"}\n')
    assert arrow_json.read_json(str(path)).to_pylist() != [{"prompt": "2024-01-02"}]
    assert source(path).sample(1) == [{"prompt": "2024-01-02"}]
