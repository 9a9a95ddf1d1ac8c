"""One run as the report reads it: settings and metrics, and what about them is missing or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.report.settings import flat_settings
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["Run", "read_run"]

_FIELD = "RUN_DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory, read."""

    directory: RunDirectory
    settings: Mapping[str, Scalar | None]
    """``section.name`` -> value, lists as text; empty where the file is missing or damaged."""
    rows: Sequence[Mapping[str, Scalar | None]]
    """A row an iteration, in order, each iteration once; numbers are finite."""
    notes: Sequence[str]
    """What a reader of the report should know is missing."""

    @property
    def planned_iterations(self) -> int | None:
        """``training.iterations``."""
        planned = self.settings.get("training.iterations")
        return planned if isinstance(planned, int) else None


def read_run(path: str | Path) -> Run:
    """Read a run directory, also one that is still being written.

    Raises:
        ConfigError: There is no such folder, or it holds no run.
    """
    directory = _run_directory(path)
    settings, settings_notes = _read_settings(directory.config)
    rows, rows_notes = _read_metrics(directory.metrics)
    return Run(directory=directory, settings=settings, rows=rows, notes=(*settings_notes, *rows_notes))


def _run_directory(path: str | Path) -> RunDirectory:
    # Resolved, so that "." and a link have a name to show.
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        remedy = "it is a file; name the folder it lies in" if folder.exists() else "no such folder"
        raise ConfigError(_FIELD, str(path), f"{remedy}; name the folder of a run")
    directory = RunDirectory(folder)
    if not directory.config.is_file() and not directory.metrics.is_file():
        remedy = "this folder holds no run (neither metrics.jsonl nor config.yaml); name one that `rlhf-ray train` made"
        raise ConfigError(_FIELD, str(path), remedy)
    return directory


def _read_settings(path: Path) -> tuple[dict[str, Scalar | None], list[str]]:
    if not path.is_file():
        return {}, ["There is no config.yaml, so no settings."]
    try:
        nested = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A file that is cut, edited by hand or of another encoding costs the settings, not the report.
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}, ["config.yaml cannot be read as YAML, so there are no settings."]
    if not isinstance(nested, dict):
        return {}, ["config.yaml holds no settings."]
    return flat_settings(nested), []


def _read_metrics(path: Path) -> tuple[list[dict[str, Scalar | None]], list[str]]:
    if not path.is_file():
        return [], ["There is no metrics.jsonl: the run has not finished an iteration."]
    lines = path.read_bytes().split(b"\n")
    parsed = [_row(line) for line in lines if line.strip()]
    return _without_abandoned(row for row in parsed if row is not None), _notes_on_lines(parsed)


def _without_abandoned(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a run went back to a checkpoint, what it had reported after that is no part of it."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["training_iteration"] >= row["training_iteration"]:
            kept.pop()
        kept.append(row)
    return kept


def _notes_on_lines(parsed: Sequence[object | None]) -> list[str]:
    if not parsed:
        return ["The run has not finished an iteration."]
    torn_end = parsed[-1] is None
    damaged = sum(row is None for row in parsed) - torn_end
    notes = ["The last line of metrics.jsonl is torn: it was being written, or the run was cut."] if torn_end else []
    if damaged:
        notes.append(f"{damaged} damaged lines of metrics.jsonl are left out.")
    return notes


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # Of the encoding or of JSON.
        return None
    if not isinstance(row, dict) or not isinstance(row.get("training_iteration"), int):
        return None
    return {key: _finite(value) for key, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
