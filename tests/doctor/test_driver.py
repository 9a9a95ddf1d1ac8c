"""What is installed on which machine, with a driver that is pretended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.doctor import driver as module
from rlhf_ray.doctor.driver import GPU, Driver, device_to_install

ROOT = Path(__file__).parents[2]
MIB = 1024**2
NEW, OLD = "580.65.06, NVIDIA H100 80GB HBM3, 81559, 81000", "550.54.15, NVIDIA H100 80GB HBM3, 81559, 81000"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the driver answer with these lines."""

    def answer(*lines: str, code: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), f"exit {code}", ""]))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return answer


def test_version_and_gpus_are_read(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(NEW, "580.65.06, NVIDIA H100 80GB HBM3, 81559, 12")
    first = GPU(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * MIB, free_bytes=81000 * MIB)
    second = GPU(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * MIB, free_bytes=12 * MIB)
    assert Driver.here() == Driver(version="580.65.06", gpus=(first, second))


def test_a_gpu_that_shares_the_memory_of_the_cpu_has_no_size(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("580.95.05, NVIDIA GB10, [N/A], [N/A]")
    here = Driver.here()
    assert here is not None
    assert here.gpus == (GPU(name="NVIDIA GB10", memory_bytes=0, free_bytes=0),)


@pytest.mark.parametrize(("line", "code"), [("Failed to initialize NVML", 18), ("No devices were found", 0)])
def test_a_driver_that_does_not_answer_has_no_gpus(line: str, code: int, nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(line, code=code)
    assert Driver.here() is None


@pytest.mark.parametrize(
    ("version", "too_old"),
    [("580.65.06", False), ("600.1", False), ("579.99", True), ("550.54.15", True), ("?", False)],
)
def test_cuda_13_needs_driver_580(version: str, too_old: bool) -> None:
    assert bool(Driver(version=version, gpus=()).too_old) is too_old


def test_without_gpus_the_cpu_packages_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert (device_to_install(), device_to_install("cpu"), device_to_install("gpu")) == ("cpu", "cpu", "gpu")


def installing(*asked: str) -> subprocess.CompletedProcess[str]:
    """As the Makefile does, before there is any package."""
    command = [sys.executable, "-I", "-S", module.__file__, *asked]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "asked", "device", "said"),
    [
        (NEW, (), "gpu", ""),
        (NEW, ("cpu",), "cpu", ""),
        (OLD, (), "cpu", "550.54.15 is older than 580, which CUDA 13 and so vLLM needs: installing for CPUs"),
        (OLD, ("cpu",), "cpu", ""),
        (OLD, ("gpu",), "", "update the driver, or install for CPUs with DEVICE=cpu"),
    ],
)
def test_what_is_installed_is_decided_before_the_download(
    line: str, asked: tuple[str, ...], device: str, said: str, nvidia_smi: Callable[..., None]
) -> None:
    nvidia_smi(line)
    done = installing(*asked)
    assert (done.returncode == 0, done.stdout.strip()) == (bool(device), device)
    assert said in done.stderr
    assert bool(said) is bool(done.stderr)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("line", "options", "extra"),
    [(NEW, (), "gpu"), (OLD, (), "cpu"), (NEW, ("DEVICE=cpu",), "cpu"), (NEW, ("DEVICE=gpu",), "gpu")],
)
def test_make_setup_installs_for_the_device_and_shows_the_download(
    line: str, options: tuple[str, ...], extra: str, nvidia_smi: Callable[..., None]
) -> None:
    nvidia_smi(line)
    command = ["make", "--dry-run", "--always-make", "setup", f"PYTHON={sys.executable}", *options]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (check,) = (number for number, step in enumerate(steps) if f"driver.py {extra}" in step)
    (download,) = (number for number, step in enumerate(steps) if "uv pip install" in step)
    assert check < download
    assert f"-e '.[{extra},test,dev]'" in steps[download]
    assert "--quiet" not in steps[download]
    assert ("--override" in steps[download]) is (extra == "cpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_setup_for_gpus_ends_where_the_driver_is_too_old(nvidia_smi: Callable[..., None], tmp_path: Path) -> None:
    nvidia_smi(OLD)
    command = ["make", "--always-make", "setup", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", "DEVICE=gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "550.54.15 is older than 580" in done.stderr
    assert not (tmp_path / "venv").exists()
