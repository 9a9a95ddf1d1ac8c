"""One line of ``metrics.jsonl`` per iteration."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rlhf_ray.config.settings import Settings
from rlhf_ray.reporting.metrics import Scalar, finite
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["JsonlReporter"]


class JsonlReporter(Reporter):
    """Appends one flat JSON object per iteration and flushes it, so that the file can be followed with ``tail -f``.

    NaN and infinities become ``null``.
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        self._file = run_dir.metrics.open("a", encoding="utf-8")

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Write the iteration's line."""
        line = {key: finite(value) for key, value in row.items()}
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def stop(self) -> None:
        """Close the file."""
        self._file.close()
