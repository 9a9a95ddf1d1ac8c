"""prompts/: datasets of the Hugging Face hub, and folders that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.errors import DataError
from rlhf_ray.hub import hub_lookup
from rlhf_ray.prompts.row_codec import Row, encode_rows
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
    """

    def __init__(self, path: str, *, subset: str | None, split: str, field: str) -> None:
        self.name = f"{path} ({split})" if subset is None else f"{path}/{subset} ({split})"
        self._path = path
        self._subset = subset
        self._split = split
        self._field = field
        self._downloaded: datasets.Dataset | None = None

    def sample(self, limit: int) -> list[Row]:
        """Download the dataset and return its first rows.

        Raises:
            DataError: The hub cannot be reached or has no such dataset, subset or split.
        """
        return _first_rows(self._dataset(), limit)

    def load(self) -> RowStore:
        """Download the dataset and put its rows into the object store.

        Raises:
            DataError: As in :meth:`sample`.
        """
        return RowStore.from_tables(_encoded_tables(self._dataset()))

    def _dataset(self) -> datasets.Dataset:
        if self._downloaded is None:
            self._downloaded = self._download()
        return self._downloaded

    def _download(self) -> datasets.Dataset:
        import datasets

        try:
            with hub_lookup(self._path):
                return datasets.load_dataset(self._path, self._subset, split=self._split)
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
        return _first_rows(self._dataset(), limit)

    def load(self) -> RowStore:
        """Put the rows into the object store.

        Raises:
            DataError: As in :meth:`sample`.
        """
        return RowStore.from_tables(_encoded_tables(self._dataset()))

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


def _first_rows(dataset: datasets.Dataset, limit: int) -> list[Row]:
    rows: list[Row] = dataset.with_format("arrow")[:limit].to_pylist()
    return rows


def _encoded_tables(dataset: datasets.Dataset) -> Iterator[pa.Table]:
    # Not ray.data.from_huggingface: it asks the hub about the dataset again, even about one on disk, and reads
    # Parquet files there in place of what was downloaded.
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_A_BLOCK):
        yield encode_rows(table.to_pylist())
