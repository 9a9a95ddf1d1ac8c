from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.sources import hub_source, is_saved_dataset, saved_dataset_source

ROWS = [{"prompt": f"p{i}", "meta": {"n": [i, i]}} for i in range(5)]


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert is_saved_dataset(tmp_path / "saved")
    assert saved_dataset_source(tmp_path / "saved", split="train").sample(3) == ROWS[:3]


def test_the_split_of_a_saved_dataset(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:]))
    both.save_to_disk(str(tmp_path))
    assert is_saved_dataset(tmp_path)
    assert saved_dataset_source(tmp_path, split="test").sample(9) == ROWS[2:]
    with pytest.raises(DataError, match="holds split test and train, but none called 'dev'"):
        saved_dataset_source(tmp_path, split="dev").sample(1)


def test_a_selection_is_saved_as_selected(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).select([4, 0]).save_to_disk(str(tmp_path))
    assert saved_dataset_source(tmp_path, split="train").sample(9) == [ROWS[4], ROWS[0]]


def test_a_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"datasets\.load_from_disk failed"):
        saved_dataset_source(tmp_path, split="train").sample(1)


def test_other_folders_are_not_saved_datasets(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    assert not is_saved_dataset(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_load_dataset_with_a_slice_of_a_split(tmp_path: Path, write_jsonl: Any) -> None:
    """A local repository goes through the same ``load_dataset`` call as one of the hub."""
    write_jsonl(ROWS, "repository/train.jsonl")
    hub = hub_source(DataSettings(path=str(tmp_path / "repository"), split="train[1:3]"), field="data.path")
    assert hub.sample(9) == ROWS[1:3]


@pytest.mark.usefixtures("cache")
def test_a_split_that_is_not_there(tmp_path: Path, write_jsonl: Any) -> None:
    write_jsonl(ROWS, "repository/train.jsonl")
    hub = hub_source(DataSettings(path=str(tmp_path / "repository"), split="test"), field="data.eval_path")
    with pytest.raises(DataError, match=r"data\.eval_path: .*Unknown split \"test\""):
        hub.sample(1)


@pytest.mark.usefixtures("cache")
def test_csv_files_of_a_repository_are_text(tmp_path: Path) -> None:
    cells = ["007", "1.50", "true", "NA", "2024-01-01", "1e5", "' '", "null", ""]
    (tmp_path / "repository").mkdir()
    text = "".join(f"{index},{cell.strip(chr(39))}\n" for index, cell in enumerate(cells))
    (tmp_path / "repository" / "train.csv").write_text("prompt,answer\n" + text)
    expected = [{"prompt": str(index), "answer": cell.strip("'")} for index, cell in enumerate(cells)]
    hub = hub_source(DataSettings(path=str(tmp_path / "repository")), field="data.path")
    assert hub.sample(99) == expected
    settings = DataSettings(path=str(tmp_path / "repository"), split="train[:2]", csv_types={"answer": "float"})
    typed = hub_source(settings, field="data.path")
    assert [row["answer"] for row in typed.sample(99)] == [7.0, 1.5]


@pytest.mark.usefixtures("cache")
def test_json_files_of_a_repository_keep_strings_that_look_like_times(tmp_path: Path, write_jsonl: Any) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"2024-01-0{i}", "meta": {"at": ["2024-01-01T00:00:00Z"]}} for i in (1, 2)]
    write_jsonl(rows, "repository/train.jsonl")
    assert hub_source(DataSettings(path=str(tmp_path / "repository")), field="data.path").sample(9) == rows


@pytest.mark.usefixtures("cache")
def test_json_files_whose_chats_differ_in_their_keys(tmp_path: Path, write_jsonl: Any) -> None:
    call = {"function": {"name": "f", "arguments": {"a": [1, "x"]}}}
    rows = [
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "assistant", "content": "b", "tool_calls": [call]}]},
    ]
    write_jsonl(rows, "repository/train.jsonl")
    assert hub_source(DataSettings(path=str(tmp_path / "repository")), field="data.path").sample(9) == rows


def test_a_saved_dataset_pads_no_nested_value(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "tool", "content": "b", "name": "f"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path))
    assert saved_dataset_source(tmp_path, split="train").sample(9) == rows


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub = hub_source(DataSettings(path="rlhf-ray-tests/no-such-data", subset="main"), field="data.path")
    assert hub.name == "rlhf-ray-tests/no-such-data/main (train)"
    with pytest.raises(DataError) as caught:
        hub.sample(1)
    assert "datasets.load_dataset('rlhf-ray-tests/no-such-data', 'main', split='train') failed" in str(caught.value)
    assert "set data.path to a local .jsonl, .parquet or .csv file" in str(caught.value)
