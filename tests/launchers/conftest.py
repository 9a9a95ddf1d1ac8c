"""The command as users call it, and the two things it talks to: a Ray cluster and a Slurm, both real and small."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

START_SLURM = Path(__file__).with_name("start_slurm.sh")
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run ``python -m rlhf_ray.launchers.<backend>`` in an empty folder, with no Ray of the machine in sight."""

    def launch(
        backend: str, *words: str, timeout_s: float = 60, cwd: Path = tmp_path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        # A short folder: the paths of Ray's sockets must fit in 107 characters.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TMPDIR")}
        return subprocess.run(
            [sys.executable, "-m", f"rlhf_ray.launchers.{backend}", *words],
            cwd=cwd,
            env={**inherited, "RAY_TMPDIR": str(tmp_path), **env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return launch


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], Path]:
    """Make a program that writes its arguments to ``<name>.args``, each ended by a zero byte."""
    folder = tmp_path / "stand-ins"

    def make(name: str, *, then: str = "") -> Path:
        folder.mkdir(exist_ok=True)
        program = folder / name
        program.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > '{program}.args'\n{then}\n")
        program.chmod(0o755)
        return program

    return make


def words_of(program: Path) -> list[str]:
    """What a stand-in was called with."""
    return Path(f"{program}.args").read_text().split("\0")[:-1]


@pytest.fixture(name="words_of")
def words_of_fixture() -> Callable[[Path], list[str]]:
    """The function above: test modules cannot import each other."""
    return words_of


@pytest.fixture(scope="module")
def ray_cluster(start_job_cluster: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """A Ray of one CPU with a job server."""
    with start_job_cluster(num_cpus=1, object_store_bytes=100_000_000) as cluster:
        yield cluster


@pytest.fixture
def job_server(ray_cluster: Any) -> str:
    return str(ray_cluster.job_server)


@pytest.fixture(scope="module")
def slurm_conf() -> Iterator[Path]:
    """A running Slurm of one node; SLURM_CONF."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    slurm = subprocess.Popen(
        ["bash", str(START_SLURM), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert slurm.stdin is not None
        assert slurm.stdout is not None
        assert slurm.stderr is not None
        if slurm.stdout.readline().strip() != "ready":
            reason = slurm.stderr.read().strip()
            pytest.skip(
                "no Slurm can be started here: it takes root and Debian's slurm-wlm and munge, which "
                f"RLHF_RAY_INSTALL_SLURM=1 lets {START_SLURM.name} install ({reason})"
            )
        yield folder / "slurm.conf"
    finally:
        slurm.communicate(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
