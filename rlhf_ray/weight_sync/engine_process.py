"""Inside an engine's own process: ends it with the replica that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

__all__ = ["end_with_parent"]


def end_with_parent() -> None:
    """End this process when the one that started it has ended, in whatever way; nothing in the first process of all.

    A replica that is killed tells its engine nothing: vLLM's process would keep its memory, on GPUs too, for good.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
