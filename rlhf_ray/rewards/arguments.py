"""Rewards, inside a reward function: reading the keyword arguments that every one receives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rlhf_ray.errors import DataError

__all__ = ["Completions", "column", "completion_texts"]

Completions: TypeAlias = Sequence[str | list[dict[str, str]]]
"""``[G]``: texts, or chats of role and content."""


def completion_texts(completions: Completions) -> list[str]:
    """``[G]`` texts: a plain completion as it is, the last message's content of a chat completion."""
    return [item if isinstance(item, str) else item[-1]["content"] for item in completions]


def column(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The dataset column ``name``, ``[G]``.

    Raises:
        DataError: The dataset has no such column.
    """
    if name not in columns:
        present = ", ".join(sorted(columns)) or "none"
        raise DataError(f"the reward reads the dataset column {name!r}, which is not there (columns: {present})")
    return columns[name]
