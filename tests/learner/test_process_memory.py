from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rlhf_ray

# As a learner's heap becomes: a large block is freed, then every second one of smaller ones.
_SCRIPT = """
import sys
import torch
from rlhf_ray.learner.process_memory import return_freed_tensors

def own_mib():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

if sys.argv[1] == "returned":
    return_freed_tensors()
torch.ones(7 * 2**20)
tensors = [torch.ones(2**19) for _ in range(100)]
before = own_mib()
del tensors[::2]
print(before - own_mib())
"""


def returned_mib(how: str) -> float:
    environment = os.environ | {"PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1])}
    environment.pop("MALLOC_MMAP_THRESHOLD_", None)
    command = [sys.executable, "-c", _SCRIPT, how]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_memory_of_freed_tensors_is_returned() -> None:
    assert returned_mib("kept") < 10, "glibc does so by itself by now"
    assert returned_mib("returned") > 90
