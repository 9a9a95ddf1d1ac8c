"""A rank's state after an update, outside of its process: what a restarted rank and a checkpoint take.

:class:`KeptState` copies in a thread, through buffers of bounded size, while engines sample: from the device, or where
engines need that, from the host memory that the tensors were moved to (residency.py). The bytes are those of a
checkpoint's file, so that a checkpoint is a copy of them. They lie in memory without a name (``memfd``), or in an
unlinked file where memory is short: both last as long as a process has them open, the rank or the keeper of its node
(state_keeper.py), and are gone with the last, however it ends.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor

from rlhf_ray.host_memory import host_memory
from rlhf_ray.learner.initial_weights import local_part

__all__ = ["KeptState", "StateFile"]

_LOG = logging.getLogger(__name__)
_PIECE_BYTES = 32 * 2**20
_LENGTH_BYTES = 8
# What the state must leave free of the host's memory: Ray kills workers where 95 % are taken.
_FREE_SHARE = 0.1

Tensors = Mapping[str, torch.Tensor]
BytesOf = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""Gives the bytes of a tensor without shards, piece by piece."""


class KeptState:
    """The newest states of this rank, in as many files as versions are kept.

    A copy overwrites the oldest version, so that of two the newer one is always complete.

    Args:
        count: Versions to keep; with 1 there is none while a copy is made.
        deferred: Whether copies wait for :meth:`start`, or for what must not happen before they are made.
    """

    def __init__(self, count: int = 1, *, deferred: bool = False) -> None:
        self._count = count
        self._deferred = deferred
        self._files: list[StateFile] = []
        self._thread = ThreadPoolExecutor(1, "keep-state")
        self._staging: _Staging | None = None
        self._waiting: list[tuple[Tensors, Callable[[BytesOf], None], Future[None]]] = []
        self._copying: Future[None] | None = None
        """The last one that was started."""

    def begin(self, version: int, tensors: Tensors, *, spare: int | None = None) -> StateFile:
        """Begin to copy tensors, which must not change until :meth:`wait` has returned.

        Args:
            version: Of the policy that they are.
            tensors: By the names of a checkpoint; sharded ones are copied as this rank has them.
            spare: A version that is not overwritten.

        Returns:
            Where they will lie; it is complete when its ``version`` is this one.
        """
        self.wait()
        if len(self._files) < self._count:
            size = sum(local_part(tensor).nbytes for tensor in tensors.values())
            self._files.append(StateFile(_room(size, self._count - len(self._files))))
        free = [file for file in self._files if file.version is None or file.version != spare]
        file = min(free or self._files, key=StateFile.age)
        file.failed = False
        reader, file.reader = file.reader, None  # The next one waits for this copy.
        self._submit(tensors, lambda bytes_of: self._copy(file, version, tensors, reader, bytes_of))
        return file

    def write(self, path: str, tensors: Tensors, version: int) -> Future[None]:
        """Write tensors to a file of their own after the copy, if there are any; :meth:`wait` waits for that too."""

        def write(bytes_of: BytesOf) -> None:
            if tensors:
                with open(path, "wb") as file:
                    _write_tensors(file.fileno(), *_layout(tensors, version), self._staging, bytes_of)

        return self._submit(tensors, write)

    def start(self, bytes_of: BytesOf | None = None) -> None:
        """Start the copies that wait, of the tensors' own memory, or of what ``bytes_of`` gives in its place."""
        for tensors, copy, done in self._waiting:
            if self._staging is None and any(map(_on_device, tensors.values())):
                self._staging = _Staging()
            if self._staging is not None:
                self._staging.follow_stream()
            self._thread.submit(_complete, done, copy, bytes_of or _own_bytes)
            self._copying = done
        self._waiting.clear()

    def wait(self) -> None:
        """Wait for all copies, also those that wait: the tensors may change then, and be freed."""
        self.start()
        self.wait_started()

    def wait_started(self) -> None:
        """Wait for the copies that were started."""
        if self._copying is not None:
            wait([self._copying])
            self._copying = None

    @property
    def versions(self) -> list[int]:
        """Those that are complete."""
        self.wait()
        return [file.version for file in self._files if file.version is not None]

    def read(self, version: int, tensors: Tensors) -> None:
        """Fill tensors with what was kept of them at a version; what came after it is forgotten.

        Raises:
            ValueError: Other tensors were kept, or not this version.
        """
        self.wait()
        file = next((file for file in self._files if file.version == version), None)
        if file is None:
            raise ValueError(f"no state was kept at policy version {version}")
        file.read(tensors)
        for later in self._files:
            if later.version is not None and later.version > version:
                later.invalidate()

    def forget(self) -> None:
        """Keep the memory, and nothing that is in it."""
        self.wait()
        for file in self._files:
            file.invalidate()

    def paths(self) -> list[str]:
        """Where another process of this machine may open the files."""
        return [file.path for file in self._files]

    def adopt(self, paths: Iterable[str]) -> None:
        """Continue with files that another process of this rank had begun."""
        self._files = [StateFile(os.open(path, os.O_RDWR | os.O_CLOEXEC)) for path in paths]

    def _submit(self, tensors: Tensors, copy: Callable[[BytesOf], None]) -> Future[None]:
        done: Future[None] = Future()
        self._waiting.append((tensors, copy, done))
        if not self._deferred:
            self.start()
        return done

    def _copy(
        self, file: StateFile, version: int, tensors: Tensors, reader: Future[Any] | None, bytes_of: BytesOf
    ) -> None:
        if reader is not None:
            wait([reader])
        try:
            file.write(version, tensors, self._staging, bytes_of)
        except Exception as error:  # A full disk: the version before is still there, and training continues.
            file.failed = True
            _LOG.error("the learner's state at policy version %d is not kept: %r", version, error)


class StateFile:
    """One version of a rank's state; incomplete as long as its first eight bytes are zero.

    Attributes:
        version: Of the policy; ``None``: the file is not complete.
        failed: Whether it will not be, since the last copy to it ended early.
        reader: Done when what is being read of it was read.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.reader: Future[Any] | None = None
        self.failed = False
        length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
        header = json.loads(os.pread(descriptor, length, _LENGTH_BYTES) or b"{}")
        self.version: int | None = int(header["__metadata__"]["version"]) if header else None

    @property
    def path(self) -> str:
        """Opens the file, in any process of this user on this machine."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def write(self, version: int, tensors: Tensors, staging: _Staging | None, bytes_of: BytesOf) -> None:
        """Replace what it holds, and complete it at once when all is there."""
        self._clear()
        _write_tensors(self._descriptor, *_layout(tensors, version), staging, bytes_of)
        self.version = version

    def read(self, tensors: Tensors) -> None:
        """Fill tensors of the same names, shapes and shards.

        Raises:
            ValueError: Others were written.
        """
        assert self.version is not None, "the file is not complete"
        header, parts = _layout(tensors, self.version)
        if os.pread(self._descriptor, len(header), 0) != header:
            raise ValueError(f"the state that was kept at policy version {self.version} is that of another model")
        offset = len(header)
        for part in parts:
            for piece in _pieces(part):
                taken = torch.empty_like(piece, device="cpu") if _on_device(piece) else piece
                _read_all(self._descriptor, _memory(taken), offset)
                if taken is not piece:
                    piece.copy_(taken)
                offset += piece.nbytes

    def copy_to(self, path: str) -> None:
        """Write it to another file, piece by piece.

        Raises:
            OSError: It is not complete, or the other file cannot be written.
        """
        if self.version is None:
            raise OSError("the state was not copied, see the log of this rank")
        shutil.copyfile(self.path, path)

    def invalidate(self) -> None:
        """Forget the version that it holds, when it is not being read any more."""
        if self.reader is not None:
            wait([self.reader])
        self._clear()

    def free(self) -> None:
        """Give the memory back."""
        self.version = None
        os.ftruncate(self._descriptor, 0)

    def age(self) -> int:
        """Orders files by what is lost with them."""
        return -1 if self.version is None else self.version

    def _clear(self) -> None:
        self.version = None
        os.pwrite(self._descriptor, bytes(_LENGTH_BYTES), 0)


def _complete(done: Future[None], copy: Callable[[BytesOf], None], bytes_of: BytesOf) -> None:
    try:
        copy(bytes_of)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


def _write_tensors(
    descriptor: int, header: bytes, parts: Iterable[torch.Tensor], staging: _Staging | None, bytes_of: BytesOf
) -> None:
    """Write parts after a header of :func:`_layout`, and the header's first bytes last."""
    offset = len(header)
    # All of a copy in one stream: what contiguous() allocates there is not given away before it was read.
    with nullcontext() if staging is None else torch.cuda.stream(staging.stream):
        for part in parts:
            for piece in bytes_of(part):
                host = staging.on_host(piece) if staging is not None and _on_device(piece) else piece
                _write_all(descriptor, _memory(host), offset)
                offset += piece.nbytes
    os.ftruncate(descriptor, offset)
    _write_all(descriptor, memoryview(header)[_LENGTH_BYTES:], _LENGTH_BYTES)
    os.pwrite(descriptor, header[:_LENGTH_BYTES], 0)


class _Staging:
    """A pinned buffer between a GPU and a file, filled in a stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self._buffer = _pinned(_PIECE_BYTES)

    def follow_stream(self) -> None:
        """Let copies wait for what the caller's stream has been given to do so far."""
        self.stream.wait_stream(torch.cuda.current_stream())

    def on_host(self, piece: torch.Tensor) -> torch.Tensor:
        """A piece on the host until the next one is; within the stream."""
        host = self._buffer[: piece.nbytes]
        host.copy_(piece, non_blocking=True)
        self.stream.synchronize()
        return host


def _layout(tensors: Tensors, version: int) -> tuple[bytes, list[torch.Tensor]]:
    """The header of a safetensors file, as PyTorch's distributed checkpoints have it, and the parts in its order."""
    from safetensors.torch import _TYPES

    type_names = {dtype: name for name, dtype in _TYPES.items()}
    offsets: dict[str, Any] = {}
    header: dict[str, Any] = {}
    parts: list[torch.Tensor] = []
    end = 0
    # Wide types first: each must begin at a multiple of its size.
    for name, tensor in sorted(tensors.items(), key=lambda named: -named[1].element_size()):
        part = local_part(tensor)
        if part.numel() == 0:
            continue
        shard = tensor.__create_chunk_list__()[0].offsets if isinstance(tensor, DTensor) else [0] * part.ndim
        offsets[name] = {SAVED_OFFSETS_KEY: list(shard)}
        data = [end, end := end + part.nbytes]
        header[name] = {"dtype": type_names[part.dtype], "shape": list(part.shape), "data_offsets": data}
        parts.append(part)
    metadata = {"format": "pt", "version": str(version), CUSTOM_METADATA_KEY: json.dumps(offsets)}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, parts


def _room(size: int, count: int) -> int:
    """Descriptor of an empty file without a name for a state of ``size`` bytes, of ``count`` that each rank makes."""
    total, available = host_memory()
    if available - count * size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) >= _FREE_SHARE * total:
        with suppress(OSError):  # A sandbox may not let it.
            return os.memfd_create("rlhf-ray-learner-state")
    _LOG.warning("the learner's state is kept in %s: memory has no room for it", tempfile.gettempdir())
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _on_device(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


def _own_bytes(part: torch.Tensor) -> Iterator[torch.Tensor]:
    return _pieces(part.contiguous())


def _pieces(part: torch.Tensor) -> Iterator[torch.Tensor]:
    """Its memory, in bytes."""
    return iter(part.view(-1).view(torch.uint8).split(_PIECE_BYTES))


def _memory(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes; not through numpy(), after which its memory could never be freed in place."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


# Both release the interpreter: the rank's other threads compute on.
def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        taken = os.preadv(descriptor, [data], offset)
        if taken == 0:
            raise OSError("the learner's state ends too early")
        data, offset = data[taken:], offset + taken
