"""Nested mappings as flat ones, and sections of settings back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "nested"]


def flatten(mapping: Mapping[str, Any], *, separator: str = ".", levels: int | None = 2) -> dict[str, Any]:
    """Return a flat mapping in the same order: ``{"training": {"lr": 1}}`` is ``{"training.lr": 1}``.

    Args:
        mapping: Mappings of mappings. Those below the levels are values.
        separator: What joins the names.
        levels: Levels of names that are joined, two for sections of settings; ``None``: all.
    """
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and levels != 1:
            inner = flatten(value, separator=separator, levels=None if levels is None else levels - 1)
            flat |= {f"{name}{separator}{key}": item for key, item in inner.items()}
        else:
            flat[name] = value
    return flat


def nested(flat: Mapping[str, Any], *, separator: str = ".") -> dict[str, Any]:
    """Undo :func:`flatten` for names of one or two levels, in the same order."""
    mapping: dict[str, Any] = {}
    for name, value in flat.items():
        outer, is_joined, inner = name.partition(separator)
        if is_joined:
            mapping.setdefault(outer, {})[inner] = value
        else:
            mapping[name] = value
    return mapping
