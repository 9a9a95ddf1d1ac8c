from __future__ import annotations

import pytest

from rlhf_ray.doctor.check import in_units


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3.25 * 1024**2, "3.2 MiB"),
        (24 * 1024**3, "24 GiB"),
        (5 * 1024**4, "5.0 TiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_bytes_in_units(size: float, text: str) -> None:
    assert in_units(size) == text
