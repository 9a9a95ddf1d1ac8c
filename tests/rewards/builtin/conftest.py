r"""The tables of docs/rewards.md, each row a test case; ``\n`` in them is a line end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
TABLES = {"gsm8k_row": "completion", "math_row": "answer of the row"}
"""The argument of a test -> the first heading of the table whose rows it gets."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in TABLES.keys() & set(metafunc.fixturenames):
        rows = table(TABLES[argument])
        metafunc.parametrize(argument, rows, ids=[" | ".join(row) for row in rows])


def table(heading: str) -> list[tuple[str, ...]]:
    body = re.search(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert body is not None, heading
    lines = body[1].splitlines()
    return [tuple(cell.strip("`").replace(r"\n", "\n") for cell in line.strip("| ").split(" | ")) for line in lines]
