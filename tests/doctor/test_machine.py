from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.doctor.machine import GPU, Machine, check_cores, check_gpus, check_open_files, check_shared_memory
from rlhf_ray.settings import ResourceSettings, Settings

MakeMachine = Callable[..., Machine]
GIB = 1024**3


def test_this_machine_has_what_every_machine_has() -> None:
    here = Machine.here()
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.available_bytes <= here.memory_bytes
    assert here.open_files > 0


@pytest.mark.parametrize(("cores", "status"), [(1, "warn"), (2, "ok")])
def test_cores(machine: MakeMachine, cores: int, status: str) -> None:
    assert check_cores(machine(cores=cores)).status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, "warn"), (4096, "ok")])
def test_open_files(machine: MakeMachine, limit: int, status: str) -> None:
    assert check_open_files(machine(open_files=limit)).status == status


@pytest.mark.parametrize(
    ("size_gib", "weights_gib", "status"),
    [
        (16, 3, "ok"),
        (6, 3, "warn"),  # wants 0.5 + 2 * 3
        (2, 3, "fail"),
        (0.0625, 0.001, "fail"),  # Docker's default of 64 MiB
        (0.25, 0.001, "warn"),
        (None, 0.001, "fail"),
    ],
)
def test_shared_memory(machine: MakeMachine, size_gib: float | None, weights_gib: float, status: str) -> None:
    check = check_shared_memory(machine(shared_memory_gib=size_gib), int(weights_gib * GIB))
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


def test_the_remedy_for_shared_memory_is_large_enough(machine: MakeMachine) -> None:
    remedy = check_shared_memory(machine(shared_memory_gib=1), 3 * GIB).remedy
    assert "--shm-size=7g" in remedy  # 0.5 + 2 * 3, rounded up


@pytest.mark.parametrize(
    ("gpus", "device", "address", "torch_sees", "status"),
    [
        (0, "auto", None, 0, "ok"),
        (0, "cpu", None, 0, "ok"),
        (0, "cuda", None, 0, "fail"),
        (0, "cuda", "head:6379", 0, "ok"),
        (4, "auto", None, 4, "ok"),
        (4, "auto", None, 0, "fail"),  # torch's CPU build on a GPU machine
        (4, "cpu", None, 0, "ok"),
    ],
)
def test_gpus(machine: MakeMachine, gpus: int, device: Any, address: str | None, torch_sees: int, status: str) -> None:
    settings = Settings(resources=ResourceSettings(device=device, ray_address=address))
    assert check_gpus(settings, machine(gpus=gpus), torch_sees=torch_sees).status == status


def test_a_gpu_that_somebody_else_uses_is_named(machine: MakeMachine) -> None:
    here = machine(gpus=2)
    here = replace(here, gpus=(here.gpus[0], replace(here.gpus[1], free_bytes=30 * GIB)))
    check = check_gpus(Settings(), here, torch_sees=2)
    assert check.status == "warn"
    assert "GPU 1: 30 GiB free" in check.detail
    assert "GPU 0" not in check.detail


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000'\necho 'NVIDIA H100 80GB HBM3, 81559, 12'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = Machine.here().gpus
    assert first == GPU(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * 1024**2, free_bytes=81000 * 1024**2)
    assert second.free_bytes == 12 * 1024**2


def test_a_driver_that_does_not_answer_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Machine.here().gpus == ()
