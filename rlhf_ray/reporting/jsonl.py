"""After each iteration: one line of ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.metrics import Scalar, flatten
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["JsonlReporter"]


class JsonlReporter(Reporter):
    """Appends one flat JSON object an iteration and flushes it, so that the file can be followed with ``tail -f``.

    NaN and infinities become ``null``: JSON has no name for them and strict readers refuse Python's.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, settings: Settings, run_dir: RunDirectory) -> None:
        """Open the file; a run that goes on appends to it."""
        self._file = run_dir.metrics.open("a", encoding="utf-8")

    def report(self, result: Mapping[str, Any]) -> None:
        """Write the iteration's line."""
        if self._file is None:
            raise RuntimeError("report() before start()")
        row = {key: _json_value(value) for key, value in flatten(result).items()}
        self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def stop(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _json_value(value: Scalar) -> Scalar | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
