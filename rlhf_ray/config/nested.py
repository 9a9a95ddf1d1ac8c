"""Nested mappings as flat ones, and sections of settings back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "sectioned"]


def flatten(nested: Mapping[str, Any], *, separator: str = ".", levels: int | None = 2) -> dict[str, Any]:
    """Return a flat mapping in the same order: ``{"training": {"lr": 1}}`` is ``{"training.lr": 1}``.

    Args:
        nested: Mappings of mappings. Those below the levels are values.
        separator: What joins the names.
        levels: Levels of names that are joined, two for sections of settings; ``None``: all.
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and levels != 1:
            inner = flatten(value, separator=separator, levels=None if levels is None else levels - 1)
            flat |= {f"{name}{separator}{key}": item for key, item in inner.items()}
        else:
            flat[name] = value
    return flat


def sectioned(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of dotted names by section, in the same order: what :func:`flatten` undoes."""
    sections: dict[str, dict[str, Any]] = {}
    for field, value in flat.items():
        section, _, name = field.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections
