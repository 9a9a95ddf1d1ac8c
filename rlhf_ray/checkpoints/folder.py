"""A folder on any file system that pyarrow knows: this machine's, S3, GCS, HDFS."""

from __future__ import annotations

import io
import os
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rlhf_ray.errors import ConfigError

__all__ = ["Folder", "StoredFile"]

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What a file must be: anything else was cut short, or is another file."""

    size_bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """Measure a file of this machine."""
        with path.open("rb") as file:
            return cls.read_from(file)

    @classmethod
    def of_bytes(cls, content: bytes) -> StoredFile:
        """Measure what is to be written."""
        return cls.read_from(io.BytesIO(content))

    @classmethod
    def read_from(cls, file: Any) -> StoredFile:
        """Measure an open file, in chunks."""
        size = crc = 0
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return cls(size_bytes=size, crc32=crc)


@dataclass(frozen=True, slots=True)
class Folder:
    """Absolute path of a folder of this machine, or a URI such as ``s3://bucket/run``; pickles as that text.

    A URI may end in options of its file system: ``s3://bucket/run?endpoint_override=minio:9000&scheme=http``.
    """

    location: str

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Folder:
        """Name a folder; it need not exist."""
        text = os.fspath(location).removeprefix("file://")
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()))
        path, options = cls(text)._path_and_options()
        return cls(path.rstrip("/") + options)

    def __truediv__(self, name: str) -> Folder:
        """A folder in this one."""
        path, options = self._path_and_options()
        return Folder(f"{path}/{name}{options}")

    def __str__(self) -> str:
        return self.location

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path_and_options()[0].rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The path, where it is one of this machine."""
        return None if "://" in self.location else Path(self.location)

    def make(self) -> None:
        """Make the folder and those above it.

        Raises:
            ConfigError: pyarrow does not know such a file system.
        """
        fs, path = self._opened()
        fs.create_dir(path, recursive=True)

    def try_out(self) -> None:
        """Write a small file and delete it.

        Raises:
            ConfigError: That cannot be done here: a wrong bucket, scheme or permission.
        """
        name = f".tried-{uuid.uuid4().hex}"
        try:
            self.make()
            self.write(name, b"rlhf_ray writes checkpoints here\n")
            self.delete_file(name)
        except ConfigError:
            raise
        except (OSError, ValueError, NotImplementedError) as error:  # What pyarrow's errors are derived from.
            remedy = f"checkpoints cannot be written there, correct it or name another place: {error}"
            raise ConfigError("checkpointing.path", self.location, remedy) from error

    def delete(self) -> None:
        """Delete the folder and all in it, if it is there."""
        fs, path = self._opened()
        with suppress(FileNotFoundError):
            fs.delete_dir(path)

    def delete_file(self, name: str) -> None:
        """Delete a file, if it is there."""
        fs, path = self._file(name)
        with suppress(FileNotFoundError):
            fs.delete_file(path)

    def folders(self) -> list[Folder]:
        """Folders in this one, by name; none where it does not exist."""
        return [self / name for name in self._names("Directory", allow_not_found=True)]

    def files(self) -> list[str]:
        """Names of the files in the folder."""
        return self._names("File", allow_not_found=False)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: There is none.
        """
        fs, path = self._file(name)
        with fs.open_input_stream(path, compression=None) as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole: a reader finds all of it or what was there before."""
        fs, path = self._file(name)
        # Object stores show a file when it is closed; a file system shows it while it grows.
        target = path if self.local is None else f"{path}.partial"
        with fs.open_output_stream(target, compression=None) as file:
            file.write(content)
        if self.local is not None:
            os.replace(target, path)

    def holds(self, name: str, wanted: StoredFile) -> bool:
        """Whether a file is there and is what it must be."""
        fs, path = self._file(name)
        try:
            with fs.open_input_stream(path, compression=None) as file:
                return StoredFile.read_from(file) == wanted
        except FileNotFoundError:
            return False

    def upload(self, file: Path) -> None:
        """Copy a file of this machine into the folder."""
        _copy(_on_this_machine(file), self._file(file.name))

    def download(self, name: str, target: Path) -> None:
        """Copy a file of the folder to this machine."""
        _copy(self._file(name), _on_this_machine(target))

    def copy_to(self, other: Folder) -> None:
        """Copy all that is in the folder, folders in it too."""
        other.make()
        _copy(self._opened(), other._opened())

    def _names(self, kind: str, *, allow_not_found: bool) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        fs, path = self._opened()
        entries = fs.get_file_info(FileSelector(path, allow_not_found=allow_not_found))
        return sorted(entry.base_name for entry in entries if entry.type == FileType[kind])

    def _path_and_options(self) -> tuple[str, str]:
        """The path, and the options of a URI with their question mark."""
        if self.local is not None:
            return self.location, ""
        path, mark, options = self.location.partition("?")
        return path, mark + options

    def _opened(self) -> _Place:
        from pyarrow.fs import FileSystem

        if self.local is not None:
            return _on_this_machine(self.local)
        try:
            fs, path = FileSystem.from_uri(self.location)
        # pyarrow's own words for an unknown scheme, an unreachable host, or a file system that it was built without.
        except (ValueError, OSError, NotImplementedError) as error:
            raise ConfigError("checkpointing.path", self.location, f"pyarrow cannot open it: {error}") from error
        return fs, path

    def _file(self, name: str) -> _Place:
        fs, path = self._opened()
        return fs, f"{path}/{name}"


_Place: TypeAlias = tuple[Any, str]
"""A file system of pyarrow and a path in it."""


def _on_this_machine(path: Path) -> _Place:
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem(), str(path)


def _copy(source: _Place, target: _Place) -> None:
    from pyarrow.fs import copy_files

    copy_files(source[1], target[1], source_filesystem=source[0], destination_filesystem=target[0])
