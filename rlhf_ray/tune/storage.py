"""How a checkpoint gets from learners on several nodes into the folder that Ray Tune hands to a trial, and back.

Tune makes a folder on the trial's own node and copies it to its storage itself; learners on other nodes cannot see it.
There the checkpoint goes through a folder in the storage, which all nodes reach.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.errors import ConfigError
from rlhf_ray.stopping import stop_all

__all__ = ["folder_to_read", "folder_to_write"]

# pyarrow's name of a file system -> the scheme of its URIs.
_SCHEMES = {"s3": "s3", "gcs": "gs", "hdfs": "hdfs", "abfs": "abfs"}


@contextmanager
def folder_to_write(given: str, storage: Any) -> Iterator[Folder]:
    """A folder that all learners can write; what is in it at the end is in ``given``.

    Args:
        given: Tune's folder.
        storage: Tune's storage; ``None`` outside of Tune.
    """
    own = Folder.at(given)
    with _reached_by_all(own, storage) as folder:
        yield folder
        if folder is not own:
            folder.copy_to(own)


@contextmanager
def folder_to_read(given: str, storage: Any) -> Iterator[Folder]:
    """A folder that all learners can read, with what is in ``given``."""
    own = Folder.at(given)
    with _reached_by_all(own, storage) as folder:
        if folder is not own:
            own.copy_to(folder)
        yield folder


@contextmanager
def _reached_by_all(own: Folder, storage: Any) -> Iterator[Folder]:
    if storage is None or len([node for node in ray.nodes() if node["Alive"]]) == 1:
        yield own
        return
    folder = Folder.at(_location(storage)) / f".between-nodes-{uuid.uuid4().hex[:8]}"
    try:
        yield folder
    finally:
        stop_all((f"folder {folder}", folder.delete))


def _location(storage: Any) -> str:
    kind = storage.storage_filesystem.type_name
    if kind == "local":
        return str(storage.trial_fs_path)
    if kind not in _SCHEMES:
        remedy = "learners on several nodes need a storage_path of S3, GCS, HDFS, Azure or a shared folder"
        raise ConfigError("RunConfig.storage_filesystem", kind, remedy)
    return f"{_SCHEMES[kind]}://{storage.trial_fs_path}"
