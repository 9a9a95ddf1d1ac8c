"""Text that datasets, policies, user code and other processes wrote, on its way to a log line or a message."""

from __future__ import annotations

__all__ = ["shortened"]


def shortened(text: object, limit: int = 500) -> str:
    """``text`` on one line of about ``limit`` characters, its middle left out, control characters replaced."""
    line = " ".join(str(text).split())
    if len(line) > limit:
        half = limit // 2
        line = f"{line[:half]} [{len(line) - 2 * half} characters] {line[-half:]}"
    return "".join(char if char.isprintable() else "\ufffd" for char in line)
