"""Before a run: what a setting names that may be a local path or a hub id, such as a model, tokenizer or dataset."""

from __future__ import annotations

from pathlib import Path

__all__ = ["absolute_if_local", "looks_local"]


def absolute_if_local(path: str) -> str:
    """A folder of this machine as an absolute path; anything else, such as a hub id, as it is.

    Processes of a run have working directories of their own.
    """
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def looks_local(path: str) -> bool:
    """Whether a name can only be that of a local path, also of one that is missing: a hub id has one slash at most."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1
