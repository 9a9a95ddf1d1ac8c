"""One command on a card: whether the GPU path is right, and how fast it is.

(a) ``learner``: one learner rank by itself (gpu_learner.py); (b) ``engine``: one vLLM engine by itself (gpu_engine.py);
(c) ``shared_gpu``: runs in which replica and learner take turns on a GPU, and (d) ``two_gpus``: two such pairs, NCCL, a
killed engine, tensor and sequence parallelism (gpu_runs.py).

    python benchmarks/gpu.py                 # all that this machine allows; by estimate 20 minutes on one GPU
    python benchmarks/gpu.py --learner-only  # (a); by estimate 6 minutes; needs torch 2.11 or newer and transformers
    python benchmarks/gpu.py --tiny          # the same code at a small size; on a CPU, what a CPU can run of it
    python benchmarks/gpu.py --parts engine shared_gpu

results/gpu.json says for each check whether it is ok, what was expected and seen, what was measured, and why it was
skipped where it was. It is written after every check, and each part runs in a process of its own: what was found
survives a crash. The exit code is 1 where a check was not ok.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from provenance import RESULTS, provenance

_Result = TypeVar("_Result")

# Part -> module and function that make its checks.
PARTS = {
    "learner": ("gpu_learner", "learner_checks"),
    "engine": ("gpu_engine", "engine_checks"),
    "shared_gpu": ("gpu_runs", "shared_gpu_checks"),
    "two_gpus": ("gpu_runs", "two_gpu_checks"),
}
# Dense bfloat16 operations per second without sparsity, by the vendor's data sheet.
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
# A check that takes longer has hung; its process is ended and the next part begins.
_CHECK_LIMIT_S = 900.0


class Report:
    """The result file: facts of the machine, and the checks of each part."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def note(self, part: str, name: str, check: dict[str, Any]) -> None:
        """Write how one check stands now."""
        self.content["checks"].setdefault(part, {})[name] = check
        self.write()

    def write(self) -> None:
        """Write the file, with ``ok`` last of what is above the checks."""
        checks = self.content.pop("checks")
        self.content |= {"ok": not self.failures(checks), "checks": checks}
        self._file.write_text(json.dumps(self.content, indent=1) + "\n")

    @staticmethod
    def failures(checks: dict[str, dict[str, Any]]) -> list[str]:
        """Part and name of each check that is neither ok nor skipped."""
        return [
            f"{part}: {name}: {check.get('why') or [each for each in check['expectations'] if not each['ok']]}"
            for part, of_part in checks.items()
            for name, check in of_part.items()
            if check["status"] not in ("ok", "skipped")
        ]


class Bench:
    """Where the checks of one part run, and what they find.

    Args:
        part: Its name.
        report: Where findings go.
        device: Where models are.
        tiny: Whether small models and few sequences will do.
        scratch: For models, checkpoints and runs.
        ends_at: On ``time.monotonic``; a check that would begin later is skipped.
    """

    def __init__(
        self, part: str, report: Report, *, device: torch.device, tiny: bool, scratch: Path, ends_at: float
    ) -> None:
        self.device, self.tiny, self.scratch = device, tiny, scratch
        self.on_gpu = device.type == "cuda"
        self._part, self._report, self._ends_at = part, report, ends_at
        self._expectations: list[dict[str, Any]] = []

    def run(self, name: str, check: Callable[[Bench], object], *, num_gpus: int = 0) -> None:
        """Make one check; an exception is a finding, and the next check is made all the same.

        Args:
            name: Of the check.
            check: Makes it, and returns what it measured.
            num_gpus: GPUs without which it is skipped.
        """
        here = torch.cuda.device_count()
        if here < num_gpus:
            found = {"status": "skipped", "why": f"it needs {num_gpus} GPU(s), and this machine has {here}"}
        elif time.monotonic() > self._ends_at:
            found = {"status": "skipped", "why": "the time given by --minutes was over"}
        else:
            self._report.note(self._part, name, {"status": "running", "expectations": []})
            found = self._made(check)
        self._report.note(self._part, name, found)
        print(f"{self._part}: {name}: {json.dumps(found, indent=1)}", flush=True)

    def _made(self, check: Callable[[Bench], object]) -> dict[str, Any]:
        self._expectations = []
        measured, why, started = None, "", time.perf_counter()
        faulthandler.dump_traceback_later(_CHECK_LIMIT_S, exit=True)
        try:
            measured = check(self)
        except Exception:
            why = traceback.format_exc()
        finally:
            faulthandler.cancel_dump_traceback_later()
        ok = all(each["ok"] for each in self._expectations)
        return {
            "status": "error" if why else "ok" if ok else "wrong",
            "seconds": round(time.perf_counter() - started, 1),
            "expectations": self._expectations,
            "measured": measured,
        } | ({"why": why} if why else {})

    def expect(self, what: str, seen: Any, expected: Any) -> None:
        """Note whether something is as expected."""
        self._note(what, seen, expected, seen == expected)

    def at_most(self, what: str, seen: float, limit: float) -> None:
        """Note whether a number, which must not be NaN, is within a limit."""
        self._note(what, seen, f"at most {limit:g}", seen <= limit)

    def at_least(self, what: str, seen: float, limit: float) -> None:
        """Note whether a number, which must not be NaN, reaches a limit."""
        self._note(what, seen, f"at least {limit:g}", seen >= limit)

    def _note(self, what: str, seen: Any, expected: Any, ok: bool) -> None:
        self._expectations.append({"what": what, "expected": expected, "seen": seen, "ok": bool(ok)})

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

    def used_gib(self) -> float:
        """GiB of the card that all processes use together; 0 on a CPU."""
        if not self.on_gpu:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return float(total - free) / 2**30

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Driver, CUDA runtime and GPUs; makes no CUDA context, which would take memory from the checks."""
    from rlhf_ray.doctor.driver import Driver

    driver = Driver.here()
    if driver is None or not torch.cuda.is_available():
        return {"driver": None if driver is None else driver.version, "cuda": torch.version.cuda, "gpus": []}
    return {
        "driver": driver.version,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "gpus": [{"name": gpu.name, "memory_gib": gpu.memory_bytes / 2**30} for gpu in driver.gpus],
    }


def run_part(name: str, out: Path, *, tiny: bool, scratch: Path, ends_at: float) -> None:
    """Make the checks of one part in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    bench = Bench(name, Report(out), device=device, tiny=tiny, scratch=scratch, ends_at=ends_at)
    module, function = PARTS[name]
    getattr(importlib.import_module(module), function)(bench)


def run_apart(name: str, out: Path, **options: Any) -> None:
    """Make the checks of one part in a process of its own, whose end is an error of the check under way."""
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(name, out), kwargs=options)
    process.start()
    process.join()
    report = Report(out)
    if process.exitcode != 0:
        under_way = [
            key for key, check in report.content["checks"].get(name, {}).items() if check["status"] == "running"
        ]
        why = f"the process of this part ended with {process.exitcode}"
        for check in under_way or ["all"]:
            report.note(name, check, {"status": "error", "expectations": [], "why": why})


def main() -> None:
    """Make the checks that this machine allows, print and write what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--learner-only", action="store_true", help="--parts learner: without Ray and vLLM")
    parser.add_argument("--tiny", action="store_true", help="small models and few sequences, on a CPU too")
    parser.add_argument("--minutes", type=float, default=60.0, help="no check begins after that many")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; with --tiny gpu_tiny.json, here")
    given = parser.parse_args()
    given.out = given.out or (Path("gpu_tiny.json") if given.tiny else RESULTS / "gpu.json")
    if not (torch.cuda.is_available() or given.tiny):
        parser.error("torch sees no GPU; --tiny runs the same code on the CPU")
    ends_at = time.monotonic() + 60.0 * given.minutes
    given.out.unlink(missing_ok=True)
    report = Report(given.out)
    report.content = provenance() | {"machine": machine(), "tiny": given.tiny, "checks": {}}
    report.write()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-gpu-") as scratch:
        for name in ("learner",) if given.learner_only else given.parts:
            run_apart(name, given.out, tiny=given.tiny, scratch=Path(scratch), ends_at=ends_at)
    failures = Report.failures(Report(given.out).content["checks"])
    print("written to", given.out)
    print("\n  ".join(["not ok:", *failures]) if failures else "all well")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
