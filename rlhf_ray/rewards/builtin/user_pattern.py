"""A regular expression of the user's with a time limit: it may take forever on what a policy writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import regex

from rlhf_ray.errors import ConfigError

__all__ = ["UserPattern"]


class UserPattern:
    """A regular expression with a time limit, ``.`` matching line ends too.

    Python's own ``re`` cannot be interrupted outside the main thread; ``regex`` reads the same patterns and can.

    Args:
        pattern: The regular expression.
        timeout_s: Longest search of one text, in seconds.
        field: The reward that it is an argument of, for messages.

    Raises:
        ConfigError: It is no regular expression, or the limit is not above 0.
    """

    def __init__(self, pattern: str, timeout_s: float, *, field: str) -> None:
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ConfigError(f"{field}.timeout_s", timeout_s, "must be finite and above 0")
        try:
            self._pattern = regex.compile(pattern, regex.DOTALL | regex.VERSION0)
        except regex.error as error:
            raise ConfigError(f"{field}.pattern", pattern, f"not a regular expression: {error}") from error
        self._timeout_s = timeout_s
        self._field = field

    def matches(self, text: str) -> bool:
        """Whether the whole of ``text`` matches.

        Raises:
            TimeoutError: That is not known in time.
        """
        with self._explained(text):
            return self._pattern.fullmatch(text, timeout=self._timeout_s) is not None

    def last(self, text: str) -> str | None:
        """The first group, or else the whole, of the last match in ``text``; ``None`` without one.

        Raises:
            TimeoutError: That is not known in time.
        """
        found: str | None = None
        with self._explained(text):
            for match in self._pattern.finditer(text, timeout=self._timeout_s):
                found = match[1 if self._pattern.groups else 0]
        return found

    @contextmanager
    def _explained(self, text: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            message = f"{self._field}.pattern takes more than {self._timeout_s:g} s ({self._field}.timeout_s)"
            raise TimeoutError(f"{message} on a completion of {len(text)} characters") from error
