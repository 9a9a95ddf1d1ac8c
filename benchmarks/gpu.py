"""One command on a card: whether the GPU path is right, and how fast it is.

(a) one learner rank by itself (gpu_learner.py), (b) one vLLM engine by itself, (c) a colocated run of three iterations,
(d) with two or more GPUs: publication over NCCL, an engine that is killed, tensor parallelism (gpu_engine.py).

    python benchmarks/gpu.py                        # all that this machine allows, about 20 minutes on one GPU
    python benchmarks/gpu.py --learner-only         # (a), about 6 minutes; needs torch 2.11 or newer and transformers
    python benchmarks/gpu.py --learner-only --tiny  # the same code at a small size, also on a CPU, in two minutes

Findings are written to results/gpu.json after every check, so that what was measured survives a run that is cut off.
The exit code is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from provenance import RESULTS, provenance

_Result = TypeVar("_Result")

# Dense bfloat16 operations a second without sparsity, by the vendor's data sheet.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
}


@dataclass(kw_only=True)
class Bench:
    """Where checks run, and what they have found so far."""

    device: torch.device
    tiny: bool
    scratch: Path
    """For models and checkpoints; removed at the end."""
    out: Path
    ends_at: float
    """On ``time.monotonic``; a check that would begin later is left out."""
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def run(self, name: str, check: Callable[[Bench], object]) -> None:
        """Make one check; an exception is a finding, and the next check is made all the same."""
        if time.monotonic() > self.ends_at:
            self.found[name] = "not run: the time given by --minutes was over"
        else:
            started = time.perf_counter()
            try:
                self.found[name] = check(self)
            except Exception:
                self.found[name] = traceback.format_exc()
                self.wrong.append(f"{name} raised {traceback.format_exc().strip().splitlines()[-1]}")
            print(
                f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(self.found[name], indent=1)}", flush=True
            )
        result = provenance() | {"device": device_facts(self.device), "tiny": self.tiny, "wrong": self.wrong}
        self.out.write_text(json.dumps(result | {"checks": self.found}, indent=1) + "\n")

    def require(self, holds: object, text: str) -> None:
        """Note what is wrong, and go on."""
        if not holds:
            self.wrong.append(text)

    @property
    def on_gpu(self) -> bool:
        """Whether models are on a GPU."""
        return bool(self.device.type == "cuda")

    @property
    def peak_flops(self) -> float | None:
        """The chip's limit in bfloat16, where it is known."""
        name = torch.cuda.get_device_name() if self.on_gpu else ""
        # The longest name that fits: an L40S is no L4.
        return PEAK_FLOPS.get(max((key for key in PEAK_FLOPS if key in name), key=len, default=""))

    def timed(self, call: Callable[[], _Result], repeats: int = 1) -> tuple[_Result, float]:
        """The last result, and seconds of one call; the device has finished before and after."""
        self._synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            result = call()
        self._synchronize()
        return result, (time.perf_counter() - started) / repeats

    def begin_peak(self) -> float:
        """GiB in use now; the peak is counted from here on."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated()) / 2**30

    def peak_gib(self) -> float | None:
        """The most that was in use since :meth:`begin_peak`; unknown on a CPU."""
        return float(torch.cuda.max_memory_allocated()) / 2**30 if self.on_gpu else None

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    if device.type != "cuda":
        return {"name": "cpu"}
    return {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "memory_gib": torch.cuda.mem_get_info()[1] / 2**30,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def main() -> None:
    """Make the checks that this machine allows, print and write what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner-only", action="store_true", help="(a) alone: without Ray and vLLM")
    parser.add_argument("--tiny", action="store_true", help="small models and few sequences, on a CPU too")
    parser.add_argument("--minutes", type=float, default=60.0, help="no check begins after that many")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.tiny):
        parser.error("torch sees no GPU; --tiny runs the same code on the CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-gpu-") as scratch:
        ends_at = time.monotonic() + 60.0 * given.minutes
        bench = Bench(device=device, tiny=given.tiny, scratch=Path(scratch), out=given.out, ends_at=ends_at)
        import gpu_learner

        gpu_learner.run(bench)
        if not given.learner_only:
            import gpu_engine

            gpu_engine.run(bench)
    print("written to", given.out)
    print("all well" if not bench.wrong else "\n  ".join(["WRONG:", *bench.wrong]))
    sys.exit(bool(bench.wrong))


if __name__ == "__main__":
    main()
