"""Datasets of the Hugging Face hub, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.prompts.formats import typed_rows
from rlhf_ray.prompts.rows import Row, RowSource, arrow_rows

if TYPE_CHECKING:
    import datasets

__all__ = ["hub_source", "is_saved_dataset", "saved_dataset_source"]

_BATCH_ROWS = 4096


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset_source(folder: Path, *, split: str) -> RowSource:
    """Return a folder that the datasets library's ``save_to_disk`` wrote.

    Args:
        folder: The folder.
        split: The split to take where it holds several.
    """

    def rows() -> Iterator[Row]:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as failure:
            raise DataError(f"{folder}: datasets.load_from_disk failed: {failure}") from failure
        if not isinstance(saved, datasets.DatasetDict):
            return _dataset_rows(saved)
        if split not in saved:
            raise DataError(f"{folder} holds split {' and '.join(sorted(saved))}, but none called {split!r}")
        return _dataset_rows(saved[split])

    return RowSource(str(folder), rows)


def hub_source(settings: DataSettings, *, field: str) -> RowSource:
    """Return a dataset of the hub, downloaded once into the datasets library's cache when its rows are first read.

    Args:
        settings: The ``data`` section, or a held-out set's own: its id in ``path``, subset and split.
        field: The setting that names it.
    """
    path, subset, split = str(settings.path), settings.subset, settings.split
    name = f"{path}{'' if subset is None else f'/{subset}'} ({split})"

    @functools.cache
    def downloaded() -> tuple[datasets.Dataset, bool]:
        try:
            with hub_lookup(path):
                return _load(path, subset, split)
        # No network, no such id, no access, no such subset or split, a broken file: each has a type of its own.
        except Exception as failure:
            call = f"datasets.load_dataset({path!r}, {subset!r}, split={split!r})"
            raise DataError(
                f"{field}: there is no file or folder {path!r} here, so it was taken for a hub id, and "
                f"{call} failed: {type(failure).__name__}: {failure}. Check the id, data.subset and the split; without "
                f"a network, set {field} to a local .jsonl, .parquet or .csv file or a save_to_disk folder"
            ) from failure

    def rows() -> Iterator[Row]:
        dataset, is_text = downloaded()
        read = _dataset_rows(dataset)
        return typed_rows(read, name, settings.csv_types) if is_text else read

    return RowSource(name, rows)


def _load(path: str, subset: str | None, split: str) -> tuple[datasets.Dataset, bool]:
    """Load a dataset whose strings stay strings, and tell whether its files are CSV, of which each column is one."""
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    builder = datasets.load_dataset_builder(path, subset)
    if isinstance(builder.config, CsvConfig):
        first_rows = datasets.load_dataset_builder(path, subset, nrows=1, na_filter=False).as_streaming_dataset()
        names = {name: None for part in first_rows.values() for row in part.take(1) for name in row}
        text = datasets.Features({name: datasets.Value("string") for name in names})
        return datasets.load_dataset(path, subset, split=split, features=text, na_filter=False), True
    loaded = datasets.load_dataset(path, subset, split=split)
    times = [field.name for field in loaded.features.arrow_schema if "timestamp" in str(field.type)]
    if times and builder.info.features is None and isinstance(builder.config, JsonConfig):
        # JSON has no times: Arrow's reader took strings for them.
        as_written = datasets.Features({**loaded.features, **{name: datasets.Json() for name in times}})
        loaded = datasets.load_dataset(path, subset, split=split, features=as_written)
    return loaded, False


def _dataset_rows(dataset: datasets.Dataset) -> Iterator[Row]:
    # Not ray.data.from_huggingface: it asks the hub about the dataset again, even about one on disk, and reads
    # Parquet files there in place of what was downloaded.
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from arrow_rows(table)
