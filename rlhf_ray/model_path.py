"""Before a run: names of models and tokenizers, as a process with another working directory needs them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["absolute_if_local"]


def absolute_if_local(path: str) -> str:
    """A folder of this machine as an absolute path; anything else, such as a hub id, as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path
