from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.config.settings import ResourceSettings, Settings
from rlhf_ray.doctor.machine import Machine, check_cores, check_gpus, check_open_files, check_shared_memory

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
    ("gpus", "device", "address", "torch_sees", "build", "status"),
    [
        (0, "auto", None, 0, "cpu", "ok"),
        (0, "cpu", None, 0, "cpu", "ok"),
        (0, "cuda", None, 0, "cuda", "fail"),
        (0, "cuda", "head:6379", 0, "cuda", "ok"),
        (4, "auto", None, 4, "cuda", "ok"),
        (4, "auto", None, 0, "cuda", "fail"),  # torch's CPU build under vLLM's CUDA build
        (4, "auto", None, 0, "cpu", "warn"),  # CPU builds on a GPU machine: the run uses CPUs
        (4, "cuda", None, 0, "cpu", "fail"),
        (4, "cpu", None, 0, "cpu", "ok"),
    ],
)
def test_gpus(
    machine: MakeMachine,
    gpus: int,
    device: Any,
    address: str | None,
    torch_sees: int,
    build: str,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_ray.doctor.machine.vllm_build", lambda: build)
    settings = Settings(resources=ResourceSettings(device=device, ray_address=address))
    assert check_gpus(settings, machine(gpus=gpus), torch_sees=torch_sees).status == status


def test_driver_and_memory_of_gpus_are_told(machine: MakeMachine) -> None:
    assert (
        check_gpus(Settings(), machine(gpus=2), torch_sees=2).detail
        == "2 x GPU, 80 GiB of 80 GiB free, driver 580.95.05"
    )


@pytest.mark.parametrize(
    ("device", "build", "torch_sees", "status"),
    [
        ("auto", "cuda", 0, "fail"),
        ("cuda", "cpu", 0, "fail"),
        ("auto", "cpu", 0, "warn"),  # The run uses CPUs.
        ("cpu", "cpu", 0, "ok"),
        ("auto", "cuda", 2, "ok"),  # With a compatibility package of CUDA's the old driver does.
    ],
)
def test_a_driver_that_is_too_old_is_named(
    machine: MakeMachine, device: Any, build: str, torch_sees: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.doctor.machine.vllm_build", lambda: build)
    settings = Settings(resources=ResourceSettings(device=device))
    check = check_gpus(settings, machine(gpus=2, driver="550.54.15"), torch_sees=torch_sees)
    assert check.status == status
    assert ("driver 550.54.15 is older than 580" in check.detail) is (status != "ok")


def test_a_gpu_that_somebody_else_uses_is_named(machine: MakeMachine) -> None:
    here = machine(gpus=2)
    assert here.driver is not None
    first, second = here.driver.gpus
    here = replace(here, driver=replace(here.driver, gpus=(first, replace(second, free_bytes=30 * GIB))))
    check = check_gpus(Settings(), here, torch_sees=2)
    assert check.status == "warn"
    assert "GPU 1: 30 GiB free" in check.detail
    assert "GPU 0" not in check.detail
