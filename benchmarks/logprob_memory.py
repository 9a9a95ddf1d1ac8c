"""Log-probabilities, forward and backward: rows per second and peak memory over sizes of a chunk, and of whole logits.

A vocabulary of 131,072 and hidden states of 896 (those of a model of half a billion parameters): 2,048 rows in float32
on a CPU, 16,384 in bfloat16 on a GPU. Chunked answers include entropies with a gradient, whole logits have none. Each
way runs in a process of its own; what counts is how far its peak memory grows beyond inputs and weights: resident
memory on a CPU, allocated memory on a GPU.

    python benchmarks/logprob_memory.py                # writes results/logprob_memory.json, or logprob_memory_gpu.json
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from provenance import write_result

from rlhf_ray.losses import chunked_logprobs_and_entropy, token_logprobs

VOCABULARY, HIDDEN = 131072, 896
ON_GPU = torch.cuda.is_available()
ROWS, DTYPE, DEVICE = (16384, torch.bfloat16, "cuda") if ON_GPU else (2048, torch.float32, "cpu")
# Of the logits of a chunk; 0: all at once, without chunks.
POWERS = (0, 24, 25, 26, 27, 28, 29) if ON_GPU else (0, 22, 24, 25, 26)


def run(power: int) -> tuple[float, float]:
    """GiB beyond the inputs, and seconds, of one forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, device=DEVICE).div_(30.0).to(DTYPE).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS,), device=DEVICE)

    def once() -> None:
        if power == 0:
            token_logprobs(hidden @ weight.T, targets).mean().backward()
        else:
            logprobs, entropies = chunked_logprobs_and_entropy(
                hidden, weight, targets, entropy_gradient=True, max_logits=2**power
            )
            assert entropies is not None
            (logprobs.mean() + 0.01 * entropies.mean()).backward()
        hidden.grad = weight.grad = None
        _peak()  # Waits for a GPU.

    if ON_GPU:
        once()  # Loads kernels.
        torch.cuda.reset_peak_memory_stats()
    before = _peak()
    started = time.perf_counter()
    once()
    return _peak() - before, time.perf_counter() - started


def _peak() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure all, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--power", type=int, help=argparse.SUPPRESS)
    power = parser.parse_args().power
    if power is not None:
        print("RESULT", *run(power))
        return
    found: dict[str, dict[str, float]] = {}
    for power in POWERS:
        command = [sys.executable, __file__, "--power", str(power)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        memory, seconds = map(float, output.split("RESULT")[1].split())
        name = f"2^{power}" if power else "whole"
        found[name] = {"peak_gib": memory, "seconds": seconds, "rows_per_s": ROWS / seconds}
        print(f"{name:<8}{memory:>8.2f} GiB beyond inputs and weights {ROWS / seconds:>10.0f} rows/s", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "dtype": str(DTYPE).removeprefix("torch."),
        "rows": ROWS,
        "vocabulary": VOCABULARY,
        "hidden": HIDDEN,
        "logits_per_chunk": found,
    }
    print("written to", write_result("logprob_memory_gpu" if ON_GPU else "logprob_memory", result))


if __name__ == "__main__":
    main()
