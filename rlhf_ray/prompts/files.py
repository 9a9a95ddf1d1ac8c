"""prompts/: JSON, Parquet and CSV files, read by Ray Data in the workers and sampled in this process."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.data_context import NUM_CPUS, data_errors, prompt_context
from rlhf_ray.prompts.file_rows import FileFormat, file_rows
from rlhf_ray.prompts.row_codec import Row
from rlhf_ray.prompts.row_store import RowStore
from rlhf_ray.worker_env import worker_env

__all__ = ["FileSource", "is_data_file"]

_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4", ".br")

# Descriptions that dataset repositories keep beside their data.
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


def is_data_file(path: Path) -> bool:
    """Tell whether a name ends like a file that can be read."""
    return _format(path) is not None


def _format(path: Path) -> FileFormat | None:
    name = path.name.lower()
    stem, _, ending = name.rpartition(".")
    compressed = f".{ending}" in _COMPRESSIONS
    file_format = _FORMATS.get(Path(stem if compressed else name).suffix)
    return None if compressed and file_format == "parquet" else file_format


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """Files of one format, in the order of their rows."""

    name: str
    files: tuple[Path, ...]
    file_format: FileFormat
    csv_types: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_paths(cls, files: Sequence[Path], csv_types: Mapping[str, str], *, name: str | None = None) -> FileSource:
        """Take files in the given order.

        Raises:
            DataError: One is a folder or of no known format, or they differ in format.
        """
        for file in files:
            if file.is_dir():
                raise DataError(f"{file} is a folder; a list of data files must name files")
            if not is_data_file(file):
                raise DataError(f"{file}: not a data file; a name must end in {', '.join(_FORMATS)}")
        formats = sorted({file_format for file in files if (file_format := _format(file)) is not None})
        if len(formats) > 1:
            raise DataError(
                f"{name or files[0].parent} holds files of several formats ({', '.join(formats)}); name one"
            )
        name = name or (files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more")
        return cls(name=name, files=tuple(files), file_format=formats[0], csv_types=csv_types)

    @classmethod
    def from_folder(cls, folder: Path, csv_types: Mapping[str, str], *, split: str) -> FileSource:
        """Take the data files in and below a folder, sorted by path; those of one split where the names tell splits.

        Raises:
            DataError: There are none, or none of that split, or they differ in format.
        """
        found = sorted(path for path in folder.rglob("*") if _is_visible_data(path.relative_to(folder), path))
        if not found:
            raise DataError(f"{folder} holds no data file; a name must end in {', '.join(_FORMATS)}")
        return cls.from_paths(_of_split(folder, found, split), csv_types, name=str(folder))

    def sample(self, limit: int) -> list[Row]:
        """Return the first rows; of files of text, parse some way beyond them.

        Raises:
            DataError: A file cannot be read or parsed.
        """
        rows = itertools.chain.from_iterable(map(self._rows, self.files))
        sampled = list(itertools.islice(rows, limit))
        if self.file_format != "parquet":
            collections.deque(itertools.islice(rows, _PARSED_ROWS), maxlen=0)
        return sampled

    def load(self) -> RowStore:
        """Read all rows with Ray Data.

        Raises:
            DataError: A worker cannot read or parse a file.
        """
        import ray.data

        from rlhf_ray.prompts.file_datasource import FileDatasource

        paths = [str(file) for file in self.files]
        few_tasks = ray.data.TaskPoolStrategy(size=min(_READ_TASKS, len(paths)))
        with data_errors(f"reading {self.name}"):
            with prompt_context():
                files = FileDatasource(paths, file_format=self.file_format, csv_types=self.csv_types)
                dataset = ray.data.read_datasource(
                    files, num_cpus=NUM_CPUS, runtime_env=worker_env(), compute=few_tasks
                )
            return RowStore.from_dataset(dataset)

    def _rows(self, file: Path) -> Iterator[Row]:
        import pyarrow as pa

        compression = None if self.file_format == "parquet" else "detect"
        try:
            with pa.input_stream(str(file), compression=compression) as stream:
                yield from file_rows(stream, file.name, file_format=self.file_format, csv_types=self.csv_types)
        except OSError as failure:
            raise DataError(f"{file}: cannot be opened: {failure}") from failure


def _is_visible_data(relative: Path, path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in relative.parts)
    return not hidden and path.is_file() and is_data_file(path) and path.name not in _NOT_DATA


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    words = [split.lower(), *_SPLIT_WORDS.get(split.lower(), ())]
    chosen = [file for file in files if _mentions(file.relative_to(folder), words)]
    if chosen:
        return chosen
    known = sorted(
        name for name, words in _SPLIT_WORDS.items() if any(_mentions(f.relative_to(folder), words) for f in files)
    )
    if known:
        raise DataError(f"{folder} holds files of split {' and '.join(known)}, but none of split {split!r}")
    return list(files)


def _mentions(relative: Path, words: Sequence[str]) -> bool:
    pattern = "|".join(map(re.escape, words))
    return re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", str(relative).lower()) is not None
