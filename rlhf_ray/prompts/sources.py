"""The path of a dataset, for training or held out -> where its rows are: files, a hub id, a function, a Dataset."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.config.settings import DataSettings
from rlhf_ray.config.user_code import load_reference
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.prompts.formats import DATA_SUFFIXES, file_format, file_rows, typed_rows
from rlhf_ray.prompts.reader import ITEM_COLUMN, configure, data_errors, mapped, ordered_tasks
from rlhf_ray.prompts.rows import Row, RowSource, RowTable, arrow_rows, encode_table, encoded_blocks
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import ray.data

__all__ = [
    "TRAINING_FIELD",
    "FileSource",
    "PromptSource",
    "find_source",
    "hub_source",
    "is_saved_dataset",
    "saved_dataset_source",
]

_BATCH_ROWS = 4096
# A hub id has no colon.
_FUNCTION = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_][\w.]*")


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


TRAINING_FIELD = "data.path"

"""The setting that names the training set; any other names a held-out set."""


# Descriptions that dataset repositories keep next to their data.
_NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


# The file names by which the datasets library tells splits apart.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


# How far beyond its sample a check looks for a broken line: about a tenth of a second where rows are short.
_PARSED_ROWS = 20_000

_READ_TASKS = 4


def find_source(settings: DataSettings, *, field: str = TRAINING_FIELD) -> PromptSource:
    """Return the dataset that the settings name; the quickstart task's where they name none.

    Args:
        settings: The ``data`` section, or a held-out set's own, as ``held_out_sets`` gives them.
        field: The setting that names the dataset.

    Raises:
        ConfigError: ``settings.path`` is of a type that names no dataset.
        DataError: The file or folder is missing, or is not one that can be read.
    """
    path: Any = settings.path
    if path is None:
        from rlhf_ray.quickstart import task

        rows = task.train_rows if field == TRAINING_FIELD else task.eval_rows
        return RowSource("the quickstart task", lambda: iter(rows()))
    if isinstance(path, (str, os.PathLike)):
        return _from_path(os.fspath(path), settings, field=field)
    if isinstance(path, Sequence) and path and all(isinstance(part, (str, os.PathLike)) for part in path):
        return FileSource([_local(os.fspath(part), field) for part in path], settings.csv_types)
    import ray.data

    if isinstance(path, ray.data.Dataset):
        return RayDatasetSource(path, name=f"the ray.data.Dataset in {field}")
    raise ConfigError(field, path, "give a file or folder, a list of files, a hub id, or a ray.data.Dataset")


def _from_path(path: str, settings: DataSettings, *, field: str) -> PromptSource:
    from rlhf_ray.prompts.sources import hub_source, is_saved_dataset, saved_dataset_source

    if "://" in path:
        remedy = f"{field} takes local paths and hub ids; build the config in Python and pass ray.data.read_json(...)"
        raise DataError(
            f"{path} is a remote address: {remedy}, read_parquet or read_csv of it instead (read_csv guesses the types "
            "of columns unless convert_options names them)"
        )
    local = Path(path).expanduser()
    if _FUNCTION.fullmatch(path) and not local.exists():
        return FunctionSource(path, field=field)
    if not (local.exists() or file_format(local) or looks_local(path)):
        return hub_source(settings, field=field)
    local = _local(path, field)
    if not local.is_dir():
        return FileSource([local], settings.csv_types)
    if is_saved_dataset(local):
        return saved_dataset_source(local, split=settings.split)
    return FileSource(_data_files(local, settings.split), settings.csv_types, name=str(local))


def _local(path: str, field: str) -> Path:
    # Absolute, because Ray's workers and Tune's trials have working directories of their own.
    local = Path(path).expanduser().absolute()
    if not local.exists():
        raise DataError(f"{field}: no such file or folder: {path} (looked at {local})")
    return local


class FileSource(RowSource):
    """Files of one format, in the order given.

    Args:
        files: The files.
        csv_types: ``data.csv_types``.
        name: What messages call them; ``None``: the first file's name.

    Raises:
        DataError: One is a folder or of no known format, or they differ in format.
    """

    def __init__(self, files: Sequence[Path], csv_types: Mapping[str, str], *, name: str | None = None) -> None:
        for file in files:
            if file.is_dir():
                raise DataError(f"{file} is a folder; a list of data files must name files")
            if file_format(file) is None:
                raise DataError(f"{file}: not a data file; a name must end in {', '.join(DATA_SUFFIXES)}")
        formats = sorted({str(file_format(file)) for file in files})
        if len(formats) > 1:
            raise DataError(
                f"{name or files[0].parent} holds files of several formats ({', '.join(formats)}); name one"
            )
        called = name or (files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more")
        super().__init__(called, lambda: itertools.chain.from_iterable(file_rows(file, csv_types) for file in files))
        self._files = files
        self._csv_types = csv_types

    def sample(self, limit: int) -> list[Row]:
        """See :meth:`RowSource.sample`; files of text are parsed some way beyond."""
        rows = self.rows()
        sampled = list(itertools.islice(rows, limit))
        if file_format(self._files[0]) != "parquet":
            collections.deque(itertools.islice(rows, _PARSED_ROWS), maxlen=0)
        return sampled

    def load(self) -> RowTable:
        """See :meth:`RowSource.load`; Ray Data's workers read the files."""
        paths = [str(file) for file in self._files]
        with data_errors(f"reading {self.name}"):
            return RowTable.from_dataset(
                ordered_tasks(_encoded_files, paths, max_tasks=_READ_TASKS, csv_types=self._csv_types)
            )


def _encoded_files(paths: pa.Table, *, csv_types: Mapping[str, str]) -> Iterator[pa.Table]:
    for path in paths[ITEM_COLUMN].to_pylist():
        yield from encoded_blocks(file_rows(Path(path), csv_types))


def _data_files(folder: Path, split: str) -> list[Path]:
    """Data files in and below a folder, sorted by path; those of one split where the names tell splits."""
    found = sorted(path for path in folder.rglob("*") if _is_visible_data(path.relative_to(folder), path))
    if not found:
        raise DataError(f"{folder} holds no data file; a name must end in {', '.join(DATA_SUFFIXES)}")

    def of_split(words: Sequence[str]) -> list[Path]:
        pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(map(re.escape, words))})(?![a-z0-9])")
        return [path for path in found if pattern.search(str(path.relative_to(folder)).lower())]

    if chosen := of_split([split.lower(), *_SPLIT_WORDS.get(split.lower(), ())]):
        return chosen
    if known := sorted(name for name, words in _SPLIT_WORDS.items() if of_split(words)):
        raise DataError(f"{folder} holds files of split {' and '.join(known)}, but none of split {split!r}")
    return found


def _is_visible_data(relative: Path, path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in relative.parts)
    return not hidden and path.is_file() and file_format(path) is not None and path.name not in _NOT_DATA


class FunctionSource(RowSource):
    """Rows that a function makes: they need no file, as the tasks of many environments.

    Args:
        reference: ``module:function`` or ``file.py:function``.
        field: The setting that names it.

    Raises:
        ConfigError: There is no such function.
    """

    def __init__(self, reference: str, *, field: str) -> None:
        function = load_reference(reference, field=field, value=reference)
        super().__init__(reference, functools.partial(_made_rows, function, reference))


def _made_rows(function: Callable[[], Iterable[Row]], reference: str) -> Iterator[Row]:
    try:
        rows = iter(function())
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                message = f"row {number} is {shortened(repr(row), 80)}, and not a mapping of columns"
                raise DataError(f"{reference}: {message}")
            yield dict(row)
    except DataError:
        raise
    except Exception as error:  # It is the user's code.
        raise DataError(f"{reference} raised {type(error).__name__}: {shortened(error)}") from error


class RayDatasetSource:
    """A dataset that the user built. It is run on a copy whose context keeps it in order and quiet."""

    def __init__(self, dataset: ray.data.Dataset, *, name: str) -> None:
        self.name = name
        self._given = dataset

    def sample(self, limit: int) -> list[Row]:
        """See :meth:`RowSource.sample`; runs the dataset as far as the first rows need it."""
        table = self._table(self._dataset().limit(limit))
        return table.take(np.arange(table.num_rows))

    def load(self) -> RowTable:
        """See :meth:`RowSource.load`."""
        return self._table(self._dataset())

    def _table(self, dataset: ray.data.Dataset) -> RowTable:
        with data_errors(f"reading {self.name}"):
            return RowTable.from_dataset(mapped(dataset, encode_table))

    def _dataset(self) -> ray.data.Dataset:
        # Datasets share their context with those they are made from; only a deep copy has one of its own.
        dataset = type(self._given).copy(self._given, _deep_copy=True)
        configure(dataset.context)
        return dataset


PromptSource: TypeAlias = RowSource | RayDatasetSource
