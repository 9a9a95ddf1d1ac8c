"""``data.eval_path`` -> the held-out sets, each with its name and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError

__all__ = ["SET_SETTINGS", "HeldOutSet", "held_out_sets"]

SET_SETTINGS: Final = (
    "split",
    "subset",
    "csv_types",
    "prompt_column",
    "prompt_template",
    "system_prompt",
    "as_chat",
    "chat_template",
    "chat_template_kwargs",
    "final_assistant",
)
"""What a set may have otherwise than the ``data`` section, in addition to its path."""

_FIELD: Final = "data.eval_path"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSet:
    """A dataset that the policy is measured on."""

    name: str
    """Unique in a run; its metrics are ``evaluation/<name>/...``."""
    field: str
    """The setting that names it, for messages."""
    data: DataSettings
    """``path`` and ``split`` are the set's own, rows keep their order; no path: the quickstart task's held-out rows."""


def held_out_sets(data: DataSettings) -> tuple[HeldOutSet, ...]:
    """The sets that ``data.eval_path`` names, in its order; empty where a run has data of its own and names no set.

    It is a dataset; or a mapping of names to datasets; or of names to mappings with a ``path`` and any of
    ``SET_SETTINGS``. What is left out is as in the ``data`` section, ``split`` as ``data.eval_split``.

    Raises:
        ConfigError: A name or a key is wrong, or a path is missing.
    """
    given = data.eval_path
    if given is None:
        return () if data.path is not None else (_set("quickstart", _FIELD, {"path": None}, data),)
    if not isinstance(given, Mapping):
        return (_set(_name_of(given), _FIELD, {"path": given}, data),)
    if not given:
        raise ConfigError(_FIELD, {}, "name at least one set, {gsm8k: gsm8k/test.jsonl}, or leave it out")
    return tuple(_named(name, item, data) for name, item in given.items())


def _named(name: object, given: Any, data: DataSettings) -> HeldOutSet:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(_FIELD, name, "a set's name is part of its metrics' names: use letters, digits and _ - .")
    field = f"{_FIELD}.{name}"
    own = dict(given) if isinstance(given, Mapping) else {"path": given}
    allowed = ("path", *SET_SETTINGS)
    for key in own:
        if key not in allowed:
            raise ConfigError(
                f"{field}.{key}", own[key], f"no such setting of a held-out set; use {', '.join(allowed)}"
            )
    if own.get("path") is None:
        raise ConfigError(field, given, f"give its path: {{{name}: {{path: test.jsonl}}}}")
    return _set(name, field, own, data)


def _set(name: str, field: str, own: Mapping[str, Any], data: DataSettings) -> HeldOutSet:
    own_data = replace(data, **{"split": data.eval_split, **own}, eval_path=None, shuffle=False)
    return HeldOutSet(name=name, field=field, data=own_data)


def _name_of(path: Any) -> str:
    return Path(path).stem if isinstance(path, str) else "dataset"
