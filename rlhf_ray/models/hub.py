"""Look-ups on the Hugging Face hub: in seconds, and in the cache alone, where it cannot be reached.

transformers and datasets retry each of a dozen requests five times, so that a machine without a network waits minutes
for the error. Here one request, without retries, finds out.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["hub_environment", "hub_lookup"]

_ANSWER_S: Final = 5.0
_KNOWN_FOR_S: Final = 60.0


@contextmanager
def hub_lookup(path: str) -> Iterator[None]:
    """Look up ``path`` with a library of Hugging Face's, from the cache alone where the hub does not answer.

    Args:
        path: Local folder or hub id.

    Raises:
        OSError: It is no local folder, the hub cannot be reached, and the cache does not hold it.
    """
    reason = None if _is_here(path) else _STATE.why_offline()
    if reason is None:
        yield
        return
    try:
        with _STATE.offline():
            yield
    except OSError as error:
        raise OSError(
            f"there is no folder {path!r} here, {reason}, and the cache of this machine does not hold it; name a local "
            "folder, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error


def hub_environment(*paths: str) -> dict[str, str]:
    """Environment variables for a process that looks up ``paths`` by itself, so that it does not wait either."""
    return {} if all(map(_is_here, paths)) or _STATE.why_offline() is None else {"HF_HUB_OFFLINE": "1"}


def _is_here(path: str) -> bool:
    return Path(path).expanduser().exists()


@dataclass(slots=True)
class _State:
    """What this process knows of the hub, and how many of its threads look into the cache alone."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while one thread asks the hub, so that the others wait for its answer."""
    asked_at: float | None = None
    reason: str | None = None
    depth: int = 0
    before: list[tuple[Any, bool]] = field(default_factory=list)

    def why_offline(self) -> str | None:
        """Why the hub is not to be asked; ``None``: it answers."""
        from huggingface_hub import constants

        with self.lock:
            if self.depth:  # The flag is ours, and requests of this process would fail.
                return self.reason
            if constants.HF_HUB_OFFLINE:
                return "HF_HUB_OFFLINE is set"
            if self.asked_at is None or time.monotonic() - self.asked_at > _KNOWN_FOR_S:
                self.reason = _probe(constants.ENDPOINT)
                self.asked_at = time.monotonic()
            return self.reason

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Keep the libraries from asking the hub; they read these flags at every look-up."""
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.before = [(module, module.HF_HUB_OFFLINE) for module in _flagged_modules()]
                for module, _ in self.before:
                    module.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                if self.depth == 0:
                    for module, flag in self.before:
                        module.HF_HUB_OFFLINE = flag


_STATE: Final = _State()


def _flagged_modules() -> list[Any]:
    from huggingface_hub import constants

    return [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]


def _probe(endpoint: str) -> str | None:
    """Ask the hub once, through the proxies and the client that the libraries use; any answer will do."""
    from huggingface_hub import get_session

    timeout_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _ANSWER_S)
    unanswered = f"the hub ({endpoint}) did not answer within {timeout_s:g} s (HF_HUB_ETAG_TIMEOUT sets the time)"
    found: list[str | None] = [unanswered]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=timeout_s)
            found[0] = None
        # Name resolution, proxies, TLS and sockets each have types of their own, and a client may be the user's.
        except Exception as error:
            if "timeout" not in type(error).__name__.lower():
                found[0] = f"the hub ({endpoint}) cannot be reached ({type(error).__name__}: {error})"

    # In a thread: looking up a name has no time limit. A daemon, which does not hold up the end of the process.
    asking = threading.Thread(target=ask, name="hub-probe", daemon=True)
    asking.start()
    asking.join(timeout_s)
    return found[0]
