import bz2
import gzip
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts import sources
from rlhf_ray.prompts.rows import Row
from rlhf_ray.prompts.sources import FileSource, PromptSource, find_source
from rlhf_ray.quickstart import task

ROWS: list[Row] = [
    {"prompt": f"p{i}", "chat": [{"role": "user", "content": str(i)}], "meta": {"n": [i, i + 1], "s": None}}
    for i in range(20)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def load(source: PromptSource) -> list[Row]:
    table = source.load()
    return table.take(np.arange(table.num_rows))


def save_json(folder: Path) -> Any:
    (folder / "data.jsonl").write_text(LINES)
    return folder / "data.jsonl"


def save_json_array(folder: Path) -> Any:
    (folder / "data.json").write_text(json.dumps(ROWS, indent=1))
    return str(folder / "data.json")


def save_gzip(folder: Path) -> Any:
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    return str(folder / "data.jsonl.gz")


def save_bzip2(folder: Path) -> Any:
    (folder / "data.json.bz2").write_bytes(bz2.compress(LINES.encode()))
    return str(folder / "data.json.bz2")


def save_parquet(folder: Path) -> Any:
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "data.parquet", row_group_size=3)
    return str(folder / "data.parquet")


def save_parquet_folder(folder: Path) -> Any:
    for part in range(5):
        (folder / f"x={part}").mkdir()
        parquet.write_table(pa.Table.from_pylist(ROWS[part * 4 : part * 4 + 4]), folder / f"x={part}/part.parquet")
    return str(folder)


def save_list_of_files(folder: Path) -> Any:
    (folder / "b.jsonl").write_text("".join(LINES.splitlines(keepends=True)[:7]))
    (folder / "a.jsonl").write_text("".join(LINES.splitlines(keepends=True)[7:]))
    return [str(folder / "b.jsonl"), folder / "a.jsonl"]


def save_to_disk(folder: Path) -> Any:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "save",
    [
        save_json,
        save_json_array,
        save_gzip,
        save_bzip2,
        save_parquet,
        save_parquet_folder,
        save_list_of_files,
        save_to_disk,
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, save: Any) -> None:
    source = find_source(DataSettings(path=save(tmp_path)))
    assert source.sample(100) == ROWS
    assert source.sample(2) == ROWS[:2]
    assert load(source) == ROWS


@pytest.mark.usefixtures("local_ray")
def test_csv(tmp_path: Path) -> None:
    (tmp_path / "data.csv.gz").write_bytes(gzip.compress(b'prompt,answer\n007,1\n"two\nlines",2\n'))
    source = find_source(DataSettings(path=str(tmp_path / "data.csv.gz")))
    rows = [{"prompt": "007", "answer": "1"}, {"prompt": "two\nlines", "answer": "2"}]
    assert load(source) == source.sample(9) == rows
    typed = find_source(DataSettings(path=str(tmp_path / "data.csv.gz"), csv_types={"answer": "int"}))
    assert load(typed) == typed.sample(9) == [row | {"answer": int(row["answer"])} for row in rows]


@pytest.mark.usefixtures("local_ray")
def test_json_that_no_arrow_table_could_hold(write_jsonl: Any) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "2024-01-02", "more": {"k": [1, "x"]}}]
    assert load(find_source(DataSettings(path=write_jsonl(rows)))) == rows


@pytest.mark.usefixtures("local_ray")
def test_a_ray_dataset_is_read_in_order_and_its_context_left_alone() -> None:
    import ray.data

    dataset = ray.data.from_items(ROWS, override_num_blocks=6).map(lambda row: {**row, "prompt": row["prompt"] + "!"})
    source = find_source(DataSettings(path=dataset))
    expected = [{**row, "prompt": row["prompt"] + "!"} for row in ROWS]
    assert source.sample(3) == expected[:3]
    assert load(source) == expected
    for context in (dataset.context, ray.data.DataContext.get_current()):
        assert not context.execution_options.preserve_order
        assert context.print_on_execution_start


@pytest.mark.usefixtures("local_ray")
def test_a_ray_dataset_pads_no_nested_value() -> None:
    import ray.data

    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "tool", "content": "b", "name": "f"}]}]
    source = find_source(DataSettings(path=ray.data.from_items(rows, override_num_blocks=1)))
    assert load(source) == source.sample(9) == rows


@pytest.mark.usefixtures("local_ray")
def test_a_ray_dataset_that_fails() -> None:
    import ray.data

    def fail(row: Row) -> Row:
        raise ValueError("bad row")

    source = find_source(DataSettings(path=ray.data.from_items(ROWS).map(fail)))
    with pytest.raises(DataError, match=r"reading the ray\.data\.Dataset in data\.path failed: .*bad row"):
        source.load()
    with pytest.raises(DataError, match="bad row"):
        source.sample(1)


@pytest.mark.usefixtures("local_ray")
def test_a_broken_line_found_by_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: not JSON"):
        find_source(DataSettings(path=str(path))).load()


@pytest.mark.usefixtures("local_ray")
def test_a_file_that_vanished_after_the_check(tmp_path: Path, write_jsonl: Any) -> None:
    path = write_jsonl(ROWS)
    source = find_source(DataSettings(path=path))
    Path(path).unlink()
    with pytest.raises(DataError, match=r"data\.jsonl: cannot be read: .*No such file"):
        source.load()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("find", "rows"), [(find_source, task.train_rows), (partial(find_source, field="f"), task.eval_rows)]
)
def test_no_path_is_the_quickstart_task(find: Any, rows: Any) -> None:
    source = find(DataSettings())
    assert source.sample(5) == rows()[:5]
    assert load(source) == rows()


def test_relative_paths_are_those_of_this_process(
    write_jsonl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_jsonl(ROWS)
    monkeypatch.chdir(tmp_path)
    source = find_source(DataSettings(path="data.jsonl"))
    monkeypatch.chdir("/")
    assert source.sample(1) == ROWS[:1]


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "/no/such/folder", "~/no-such-folder", "a/b/c", "x.csv.gz"]
)
def test_a_missing_path(path: str) -> None:
    with pytest.raises(DataError, match=r"data\.path: no such file or folder: .* \(looked at /"):
        find_source(DataSettings(path=path))


@pytest.mark.parametrize("path", ["openai/gsm8k", "squad"])
def test_what_is_no_path_is_a_hub_id(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    source = find_source(DataSettings(path=path, subset="main"))
    assert not isinstance(source, FileSource)
    assert source.name == f"{path}/main (train)"
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / "test.jsonl").write_text(LINES)
    assert find_source(DataSettings(path=path, split="test"), field="f").sample(1) == ROWS[:1]


def test_a_subset_is_the_hubs_alone(write_jsonl: Any) -> None:
    assert find_source(DataSettings(path=write_jsonl(ROWS), subset="main")).sample(1) == ROWS[:1]
    held_out = DataSettings(path="openai/gsm8k", subset="main", split="test")
    assert find_source(held_out, field="f").name == "openai/gsm8k/main (test)"


def test_settings_that_name_no_dataset(write_jsonl: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.path = 5: give a file or folder"):
        find_source(DataSettings(path=5))
    with pytest.raises(ConfigError, match=r"data\.path = \[\]: give a file or folder"):
        find_source(DataSettings(path=[]))
    with pytest.raises(ConfigError, match=r"data\.eval_path\.hard = 5: give a file or folder"):
        find_source(DataSettings(path=5), field="data.eval_path.hard")
    with pytest.raises(DataError, match=r"s3://bucket/data\.jsonl is a remote address: .*pass ray\.data\.read_json"):
        find_source(DataSettings(path="s3://bucket/data.jsonl"))


@pytest.mark.usefixtures("local_ray")
def test_our_executions_are_not_in_the_console(write_jsonl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        find_source(DataSettings(path=write_jsonl(ROWS))).load()
    assert "Dataset" not in capfd.readouterr().err


# Files and folders.


def source(*paths: Path) -> FileSource:
    return FileSource(list(paths), {})


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
    monkeypatch.setattr(sources, "_PARSED_ROWS", 10)
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n' * 40 + "{broken\n")
    assert len(source(path).sample(3)) == 3


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def chosen(folder: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in sources._data_files(folder, split)]


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
        find_source(DataSettings(path=str(tmp_path / "a")))
    with pytest.raises(DataError, match="holds no data file"):
        chosen(tmp_path / "b")
    with pytest.raises(DataError, match="is a folder; a list"):
        source(tmp_path / "a")
    with pytest.raises(DataError, match=r"notes\.txt: not a data file; a name must end in \.jsonl"):
        source(tmp_path / "b/notes.txt")
