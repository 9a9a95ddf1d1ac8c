"""checkpoints/: a folder on any file system that pyarrow knows: this machine's, S3, GCS, HDFS."""

from __future__ import annotations

import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        size = crc = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return cls(size_bytes=size, crc32=crc)

    @classmethod
    def of_bytes(cls, content: bytes) -> StoredFile:
        """Measure what is to be written."""
        return cls(size_bytes=len(content), crc32=zlib.crc32(content))


@dataclass(frozen=True, slots=True)
class Folder:
    """Absolute path of a folder of this machine, or a URI such as ``s3://bucket/run``; pickles as that text.

    A URI may end in options of its file system: ``s3://bucket/run?endpoint_override=minio:9000&scheme=http``.
    """

    location: str

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Folder:
        """Name a folder; it need not exist."""
        text = os.fspath(location)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if "://" in text:
            path, options = _split(text)
            return cls(path.rstrip("/") + options)
        return cls(str(Path(text).expanduser().absolute()))

    def __truediv__(self, name: str) -> Folder:
        """A folder in this one."""
        if self.local is not None:
            return Folder(f"{self.location}/{name}")
        path, options = _split(self.location)
        return Folder(f"{path}/{name}{options}")

    def __str__(self) -> str:
        return self.location

    @property
    def name(self) -> str:
        """The last part of the path."""
        path = self.location if self.local is not None else _split(self.location)[0]
        return path.rsplit("/", 1)[-1]

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
        try:
            fs.delete_dir(path)
        except FileNotFoundError:
            return

    def delete_file(self, name: str) -> None:
        """Delete a file, if it is there."""
        fs, path = self._opened()
        try:
            fs.delete_file(f"{path}/{name}")
        except FileNotFoundError:
            return

    def folders(self) -> list[Folder]:
        """Folders in this one, by name; none where it does not exist."""
        from pyarrow.fs import FileSelector, FileType

        fs, path = self._opened()
        entries = fs.get_file_info(FileSelector(path, allow_not_found=True))
        return [self / name for name in sorted(e.base_name for e in entries if e.type == FileType.Directory)]

    def files(self) -> list[str]:
        """Names of the files in the folder."""
        from pyarrow.fs import FileSelector, FileType

        fs, path = self._opened()
        return sorted(e.base_name for e in fs.get_file_info(FileSelector(path)) if e.type == FileType.File)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: There is none.
        """
        fs, path = self._opened()
        with fs.open_input_stream(f"{path}/{name}", compression=None) as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole: a reader finds all of it or what was there before."""
        fs, path = self._opened()
        # Object stores show a file when it is closed; a file system shows it while it grows.
        target = f"{path}/{name}" if self.local is None else f"{path}/{name}.partial"
        with fs.open_output_stream(target, compression=None) as file:
            file.write(content)
        if self.local is not None:
            os.replace(target, f"{path}/{name}")

    def holds(self, name: str, wanted: StoredFile) -> bool:
        """Whether a file is there and is what it must be."""
        fs, path = self._opened()
        size = crc = 0
        try:
            with fs.open_input_stream(f"{path}/{name}", compression=None) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        except FileNotFoundError:
            return False
        return (size, crc) == (wanted.size_bytes, wanted.crc32)

    def upload(self, file: Path) -> None:
        """Copy a file of this machine into the folder."""
        self._copy(str(file), f"{self._opened()[1]}/{file.name}", upload=True)

    def download(self, name: str, target: Path) -> None:
        """Copy a file of the folder to this machine."""
        self._copy(f"{self._opened()[1]}/{name}", str(target), upload=False)

    def copy_to(self, other: Folder) -> None:
        """Copy all that is in the folder, folders in it too."""
        from pyarrow.fs import copy_files

        other.make()
        (source, source_path), (target, target_path) = self._opened(), other._opened()
        copy_files(source_path, target_path, source_filesystem=source, destination_filesystem=target)

    def _copy(self, source: str, target: str, *, upload: bool) -> None:
        from pyarrow.fs import LocalFileSystem, copy_files

        there, here = self._opened()[0], LocalFileSystem()
        systems = (here, there) if upload else (there, here)
        copy_files(source, target, source_filesystem=systems[0], destination_filesystem=systems[1])

    def _opened(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem, LocalFileSystem

        if self.local is not None:
            return LocalFileSystem(), self.location
        try:
            fs, path = FileSystem.from_uri(self.location)
        # pyarrow's own words for an unknown scheme, an unreachable host, or a file system that it was built without.
        except (ValueError, OSError, NotImplementedError) as error:
            raise ConfigError("checkpointing.path", self.location, f"pyarrow cannot open it: {error}") from error
        return fs, path


def _split(uri: str) -> tuple[str, str]:
    """The path of a URI, and its options with their question mark."""
    path, mark, options = uri.partition("?")
    return path, mark + options
