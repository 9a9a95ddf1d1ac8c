"""prompts/: datasets of the Hugging Face hub, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.errors import DataError
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.prompts.csv_rows import typed_rows
from rlhf_ray.prompts.row_codec import Row, arrow_rows, encode_rows
from rlhf_ray.prompts.row_store import RowStore

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["HubSource", "SavedDatasetSource", "is_saved_dataset"]

_ROWS_A_BLOCK = 4096


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


class HubSource:
    """A dataset of the hub, downloaded once into the datasets library's cache.

    Args:
        path: Its id.
        subset: Configuration name, where it has several.
        split: For example ``train`` or ``train[:10%]``.
        field: The setting that names it.
        csv_types: ``data.csv_types``, where its files are CSV.
    """

    def __init__(
        self, path: str, *, subset: str | None, split: str, field: str, csv_types: Mapping[str, str] | None = None
    ) -> None:
        self.name = f"{path} ({split})" if subset is None else f"{path}/{subset} ({split})"
        self._path = path
        self._subset = subset
        self._split = split
        self._field = field
        self._csv_types = csv_types or {}
        self._is_text = False
        self._downloaded: datasets.Dataset | None = None

    def sample(self, limit: int) -> list[Row]:
        """Download the dataset and return its first rows.

        Raises:
            DataError: The hub cannot be reached or has no such dataset, subset or split.
        """
        return list(itertools.islice(self._rows(), limit))

    def load(self) -> RowStore:
        """Download the dataset and put its rows into the object store.

        Raises:
            DataError: As in :meth:`sample`.
        """
        return RowStore.from_tables(_tables(self._rows()))

    def _rows(self) -> Iterator[Row]:
        rows = _rows(self._dataset())
        return typed_rows(rows, self.name, self._csv_types) if self._is_text else rows

    def _dataset(self) -> datasets.Dataset:
        if self._downloaded is None:
            self._downloaded = self._download()
        return self._downloaded

    def _download(self) -> datasets.Dataset:
        try:
            with hub_lookup(self._path):
                loaded, self._is_text = _load(self._path, self._subset, self._split)
            return loaded
        # No network, no such id, no access, no such subset or split, a broken file: each has a type of its own.
        except Exception as failure:
            call = f"datasets.load_dataset({self._path!r}, {self._subset!r}, split={self._split!r})"
            raise DataError(
                f"{self._field}: there is no file or folder {self._path!r} here, so it was taken for a hub id, and "
                f"{call} failed: {type(failure).__name__}: {failure}. Check the id, data.subset and the split; without "
                f"a network, set {self._field} to a local .jsonl, .parquet or .csv file or a save_to_disk folder"
            ) from failure


class SavedDatasetSource:
    """A folder that the datasets library's ``save_to_disk`` wrote.

    Args:
        folder: The folder.
        split: The split to take where it holds several.
    """

    def __init__(self, folder: Path, *, split: str) -> None:
        self.name = str(folder)
        self._folder = folder
        self._split = split

    def sample(self, limit: int) -> list[Row]:
        """Return the first rows.

        Raises:
            DataError: The folder is damaged or lacks the split.
        """
        return list(itertools.islice(_rows(self._dataset()), limit))

    def load(self) -> RowStore:
        """Put the rows into the object store.

        Raises:
            DataError: As in :meth:`sample`.
        """
        return RowStore.from_tables(_tables(_rows(self._dataset())))

    def _dataset(self) -> datasets.Dataset:
        import datasets

        try:
            saved = datasets.load_from_disk(str(self._folder))
        except (OSError, ValueError, KeyError) as failure:
            raise DataError(f"{self._folder}: datasets.load_from_disk failed: {failure}") from failure
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if self._split not in saved:
            raise DataError(
                f"{self._folder} holds split {' and '.join(sorted(saved))}, but none called {self._split!r}"
            )
        return saved[self._split]


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


def _rows(dataset: datasets.Dataset) -> Iterator[Row]:
    # Not ray.data.from_huggingface: it asks the hub about the dataset again, even about one on disk, and reads
    # Parquet files there in place of what was downloaded.
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_A_BLOCK):
        yield from arrow_rows(table)


def _tables(rows: Iterator[Row]) -> Iterator[pa.Table]:
    while block := list(itertools.islice(rows, _ROWS_A_BLOCK)):
        yield encode_rows(block)
