"""Shutdown: every part is stopped, whatever the others do, and the error that led to it is the one that is raised."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

__all__ = ["stop_all"]

_LOG = logging.getLogger(__name__)


def stop_all(*steps: tuple[str, Callable[[], object]]) -> None:
    """Call every step in order; one that fails is logged, with what it may have left, and ends no other.

    Args:
        steps: What a step ends, for the log, and the call that ends it.

    Raises:
        KeyboardInterrupt: A step was interrupted, after all others were called. Not where an exception is being
            handled already: that one is the cause, and the caller is about to raise it. The same holds for
            ``SystemExit``.
    """
    cause, interrupt = sys.exception(), None
    for name, stop in steps:
        try:
            stop()
        except BaseException as error:
            _LOG.warning("%s: stopping failed (%r); it may be left behind", name, error, exc_info=True)
            if not isinstance(error, Exception):
                interrupt = interrupt or error
    if interrupt is not None and cause is None:
        raise interrupt
