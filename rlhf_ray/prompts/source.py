"""prompts/: the path of a dataset, for training or held out -> where the rows are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.data_context import NUM_CPUS, RUN_NAME, configure, data_errors
from rlhf_ray.prompts.files import FileSource, is_data_file
from rlhf_ray.prompts.huggingface import HubSource, SavedDatasetSource, is_saved_dataset
from rlhf_ray.prompts.row_codec import ROW_COLUMN, Row, decode_row, encode_dataset, encode_rows
from rlhf_ray.prompts.row_store import RowStore

if TYPE_CHECKING:
    import ray.data

__all__ = ["PromptSource", "find_eval_source", "find_source"]


class PromptSource(Protocol):
    """A place with rows."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def sample(self, limit: int) -> list[Row]:
        """Return up to ``limit`` rows from its start, in this process."""

    def load(self) -> RowStore:
        """Read all rows into the object store."""


def find_source(settings: DataSettings) -> PromptSource:
    """Return the training set that the settings name; the quickstart task where they name none.

    Raises:
        ConfigError: ``data.path`` is of a type that names no dataset.
        DataError: The file or folder is missing, or is not one that can be read.
    """
    if settings.path is None:
        return QuickstartSource("train_rows")
    return _source(settings.path, settings, split=settings.split, field="data.path")


def find_eval_source(settings: DataSettings, *, field: str) -> PromptSource:
    """Return a held-out set; the quickstart task's where its settings name no path.

    Args:
        settings: The set's own, as ``held_out_sets`` gives them: its path is in ``path``.
        field: The setting that names the set, for messages.

    Raises:
        ConfigError: As in :func:`find_source`.
        DataError: As in :func:`find_source`.
    """
    if settings.path is None:
        return QuickstartSource("eval_rows")
    return _source(settings.path, settings, split=settings.split, field=field)


def _source(path: Any, settings: DataSettings, *, split: str, field: str) -> PromptSource:
    if isinstance(path, (str, os.PathLike)):
        source = _from_path(os.fspath(path), settings, split=split, field=field)
    elif isinstance(path, Sequence) and path and all(isinstance(part, (str, os.PathLike)) for part in path):
        source = FileSource.from_paths([_local(os.fspath(part), field) for part in path], settings.csv_types)
    elif _is_ray_dataset(path):
        source = RayDatasetSource(path, name=f"the ray.data.Dataset in {field}")
    else:
        remedy = "give a file or folder, a list of files, a hub id, or a ray.data.Dataset"
        raise ConfigError(field, path, remedy)
    return source


def _from_path(path: str, settings: DataSettings, *, split: str, field: str) -> PromptSource:
    if "://" in path:
        remedy = f"{field} takes local paths and hub ids; build the config in Python and pass ray.data.read_json(...)"
        raise DataError(
            f"{path} is a remote address: {remedy}, read_parquet or read_csv of it instead (read_csv guesses the types "
            "of columns unless convert_options names them)"
        )
    local = Path(path).expanduser()
    if not (local.exists() or is_data_file(local) or looks_local(path)):
        return HubSource(path, subset=settings.subset, split=split, field=field, csv_types=settings.csv_types)
    local = _local(path, field)
    if local.is_dir() and is_saved_dataset(local):
        return SavedDatasetSource(local, split=split)
    if local.is_dir():
        return FileSource.from_folder(local, settings.csv_types, split=split)
    return FileSource.from_paths([local], settings.csv_types)


def _local(path: str, field: str) -> Path:
    # Absolute, because Ray's workers and Tune's trials have working directories of their own.
    local = Path(path).expanduser().absolute()
    if not local.exists():
        raise DataError(f"{field}: no such file or folder: {path} (looked at {local})")
    return local


def _is_ray_dataset(value: Any) -> bool:
    import ray.data

    return isinstance(value, ray.data.Dataset)


class QuickstartSource:
    """The embedded task's rows (``rlhf_ray.quickstart.task``)."""

    def __init__(self, rows: Literal["train_rows", "eval_rows"]) -> None:
        self.name = "the quickstart task"
        self._rows = rows

    def sample(self, limit: int) -> list[Row]:
        """Return the first rows."""
        from rlhf_ray.quickstart import task

        rows: list[Row] = getattr(task, self._rows)()
        return rows[:limit]

    def load(self) -> RowStore:
        """Put the rows into the object store."""
        from rlhf_ray.quickstart import task

        return RowStore.from_tables([encode_rows(getattr(task, self._rows)())])


class RayDatasetSource:
    """A dataset that the user built. It is run on a copy whose context keeps its order and its peace."""

    def __init__(self, dataset: ray.data.Dataset, *, name: str) -> None:
        self.name = name
        self._given = dataset

    def sample(self, limit: int) -> list[Row]:
        """Run the dataset as far as the first rows need it.

        Raises:
            DataError: It fails; the cause is named.
        """
        with data_errors(f"reading {self.name}"):
            first = encode_dataset(self._dataset().limit(limit), num_cpus=NUM_CPUS)
            first.set_name(RUN_NAME)
            return [decode_row(row[ROW_COLUMN]) for row in first.take_all()]

    def load(self) -> RowStore:
        """Run the whole dataset.

        Raises:
            DataError: It fails; the cause is named.
        """
        with data_errors(f"reading {self.name}"):
            return RowStore.from_dataset(encode_dataset(self._dataset(), num_cpus=NUM_CPUS))

    def _dataset(self) -> ray.data.Dataset:
        # Datasets share their context with those they are made from; only a deep copy has one of its own.
        dataset = type(self._given).copy(self._given, _deep_copy=True)
        configure(dataset.context)
        return dataset
