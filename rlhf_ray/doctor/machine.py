"""Before a run: what this machine has, and whether that is enough to start with."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.settings import Settings
from rlhf_ray.doctor.check import Check, failed, in_units, passed, warned
from rlhf_ray.doctor.driver import GPU, Driver
from rlhf_ray.host_memory import first_line, host_memory
from rlhf_ray.rollouts.engine_spec import vllm_build

__all__ = ["Machine", "check_cores", "check_gpus", "check_open_files", "check_shared_memory"]

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
    """Soft limit of open files a process."""
    driver: Driver | None
    """NVIDIA's; ``None``: there are no GPUs."""

    @property
    def gpus(self) -> tuple[GPU, ...]:
        """The GPUs of this machine."""
        return self.driver.gpus if self.driver is not None else ()

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


def check_cores(machine: Machine) -> Check:
    """Sampling and updating take turns, but Ray, the rewards and the driver want a core too."""
    detail = f"{machine.cores} cores, {in_units(machine.available_bytes)} of {in_units(machine.memory_bytes)} free"
    if machine.cores < 2:
        return warned("machine", detail, "use a machine with two cores or more; on one, everything waits for the rest")
    return passed("machine", detail)


def check_shared_memory(machine: Machine, weights_bytes: int) -> Check:
    """Ray's object store lies in /dev/shm: weights that engines have, and those that come next."""
    name, size = "/dev/shm", machine.shared_memory_bytes
    needed = _LEAST_SHARED_MEMORY + 2 * weights_bytes
    if size is None:
        return failed(name, "there is none", "run on Linux; engines receive their weights through /dev/shm")
    if size >= needed:
        return passed(name, in_units(size))
    detail = f"{in_units(size)}, wants {in_units(needed)} for Ray's object store with two versions of the weights"
    remedy = f"start the container with --shm-size={-(-needed // _GIB)}g, or remount /dev/shm with that size"
    return failed(name, detail, remedy) if size < weights_bytes + _GIB // 8 else warned(name, detail, remedy)


def check_open_files(machine: Machine) -> Check:
    """Ray opens a socket for every worker and every object in transfer."""
    if machine.open_files < _LEAST_OPEN_FILES:
        return warned("ulimit -n", str(machine.open_files), "raise it: ulimit -n 65536, before Ray starts")
    return passed("ulimit -n", str(machine.open_files))


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
            return failed(name, "none here, resources.device is cuda", "set resources.device=cpu, or join a cluster")
        return passed(name, "none here" if device != "cuda" else "none here; the cluster's are used")
    free = f"{in_units(min(gpu.free_bytes for gpu in gpus))} of {in_units(min(gpu.memory_bytes for gpu in gpus))} free"
    detail = f"{len(gpus)} x {gpus[0].name}, {free}, driver {driver.version}"
    if device == "cpu":
        return passed(name, f"{detail}, not used (resources.device is cpu)")
    if torch_sees == 0 and driver.too_old:
        check = failed if device == "cuda" or vllm_build() == "cuda" else warned
        return check(name, f"{detail}; {driver.too_old}", "update the driver and install rlhf-ray[gpu]")
    if torch_sees == 0 and device == "auto" and vllm_build() == "cpu":
        return warned(name, f"{detail}, not used by the CPU builds of vLLM and torch", "install rlhf-ray[gpu]")
    if torch_sees == 0:
        remedy = "install the CUDA builds (rlhf-ray[gpu]), or set resources.device=cpu"
        return failed(name, f"{detail}, but this torch sees none", remedy)
    if busy := [index for index, gpu in enumerate(gpus) if gpu.free_bytes < _MOSTLY_FREE * gpu.memory_bytes]:
        in_use = ", ".join(f"GPU {index}: {in_units(gpus[index].free_bytes)} free" for index in busy)
        remedy = "end what holds their memory (nvidia-smi), or hide them with CUDA_VISIBLE_DEVICES"
        return warned(name, f"{detail}; in use: {in_use}", remedy)
    return passed(name, detail)


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = first_line(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(allowed, int(quota[0]) // int(quota[1])))
    return allowed
