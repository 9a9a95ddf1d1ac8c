"""Settings of runs, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.nested import flatten
from rlhf_ray.reporting.metrics import Scalar

__all__ = ["differences", "flat_settings", "key_settings", "shown"]

_KEY_SETTINGS = (
    ("model", "model.path"),
    ("data", "data.path"),
    ("prompts", "data.batch_size"),
    ("completions a prompt", "rollouts.group_size"),
    ("longest completion", "rollouts.max_new_tokens"),
    ("staleness", "rollouts.max_staleness"),
    ("lr", "training.lr"),
    ("KL weight", "training.kl_coef"),
    ("seed", "debugging.seed"),
)
_BUILT_IN = "quickstart"

# They differ between any two runs and say nothing about how they were trained.
_PLACES = frozenset({"reporting.run_dir"})


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

    A setting that only some runs have, all with one value, came with another version of the library: it is no
    difference that anybody chose, and is left out.
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
