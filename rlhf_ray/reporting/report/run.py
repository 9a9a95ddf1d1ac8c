"""Runs as the report reads them: settings and metrics, what about them is missing or damaged, and what differs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.nested import flatten
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.metrics import Scalar, finite
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["Run", "differences", "flat_settings", "key_settings", "read_run", "shown"]

_FIELD = "RUN_DIR"
_KEY_SETTINGS = (
    ("model", "model.path"),
    ("data", "data.path"),
    ("prompts", "data.batch_size"),
    ("completions per prompt", "rollouts.group_size"),
    ("longest completion", "rollouts.max_new_tokens"),
    ("staleness", "rollouts.max_staleness"),
    ("lr", "training.lr"),
    ("KL weight", "training.kl_coef"),
    ("seed", "debugging.seed"),
)
_BUILT_IN = "quickstart"

# They differ between any two runs and say nothing about how they were trained.
_PLACES = frozenset({"reporting.run_dir"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory, read."""

    directory: RunDirectory
    settings: Mapping[str, Scalar | None]
    """``section.name`` -> value, lists as text; empty where the file is missing or damaged."""
    rows: Sequence[Mapping[str, Scalar | None]]
    """One row per iteration, in order, each iteration once; numbers are finite."""
    notes: Sequence[str]
    """What a reader of the report should know is missing."""


def read_run(path: str | Path) -> Run:
    """Read a run directory, also one that is still being written.

    Raises:
        ConfigError: There is no such folder, or it holds no run.
    """
    directory = _run_directory(path)
    settings, settings_notes = _read_settings(directory.config)
    rows, rows_notes = _read_metrics(directory.metrics)
    return Run(directory=directory, settings=settings, rows=rows, notes=(*settings_notes, *rows_notes))


def flat_settings(nested: Mapping[str, Any]) -> dict[str, Scalar | None]:
    """``{"training": {"lr": 1}}`` as ``{"training.lr": 1}``; what is not a scalar becomes JSON text."""
    flat = flatten(nested)
    for name, value in flat.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            flat[name] = json.dumps(value, ensure_ascii=False, default=str)
    return flat


def key_settings(settings: Mapping[str, Scalar | None]) -> list[tuple[str, str]]:
    """The few that say what a run is, as label and text; a run without a model or data used the built-in ones."""
    return [
        (label, _BUILT_IN if settings[name] is None else shown(settings[name]))
        for label, name in _KEY_SETTINGS
        if name in settings
    ]


def differences(runs: Sequence[Mapping[str, Scalar | None]]) -> list[tuple[str, list[str]]]:
    """Name and, for each run, text of every setting in which runs differ; ``""`` where a run does not have it.

    A setting that only some runs have, all with one value, came with another version of the library: it is not a
    difference that was chosen, and is left out.
    """
    names = dict.fromkeys(name for settings in runs for name in settings)
    table = []
    for name in names:
        values = [shown(settings[name]) if name in settings else "" for settings in runs]
        known = {value for value, settings in zip(values, runs, strict=True) if name in settings}
        if len(known) > 1 and name not in _PLACES:
            table.append((name, values))
    return table


def shown(value: Scalar | None) -> str:
    """A setting as YAML would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def _run_directory(path: str | Path) -> RunDirectory:
    # Resolved, so that "." and a link have a name to show.
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        remedy = "it is a file; name the folder that it is in" if folder.exists() else "no such folder"
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
    """Where a run went back to a checkpoint, what it had reported after that is not part of it."""
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
    return {key: finite(value) for key, value in row.items()}
