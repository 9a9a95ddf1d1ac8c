"""Columns that the page's script makes of the numbers; skipped where there is no Node.js to run it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.reporting import report

NODE = shutil.which("node")
SCRIPT = Path(report.__file__).parent / "assets" / "series.js"
pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js: no node is on the PATH")


def stacked(*columns: list[float | None]) -> list[list[float | None]]:
    """Sums that a stacked chart draws of its parts over 0, 1, ..., the highest first."""
    assert NODE is not None
    xs = list(range(len(columns[0])))
    call = f"stack({json.dumps([xs, *columns])}, {json.dumps([{}] * len(columns))})"
    program = f"{SCRIPT.read_text(encoding='utf-8')}\nconsole.log(JSON.stringify({call}))"
    said = subprocess.run([NODE, "-e", program], capture_output=True, text=True, check=True, timeout=60).stdout
    contents: dict[str, Any] = json.loads(said)
    assert contents["shown"] == [xs, *reversed(columns)]
    return list(contents["data"][1:])


def test_parts_are_added_up_and_one_that_is_missing_is_nothing() -> None:
    assert stacked([1, 2, None], [0.5, None, 4]) == [[1.5, 2, 4], [1, 2, 0]]


def test_where_no_part_was_measured_there_is_no_sum() -> None:
    assert stacked([None, 1, None], [None, 2, None]) == [[None, 3, None], [None, 1, None]]
