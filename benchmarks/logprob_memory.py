"""Peak memory of log-probabilities, forward and backward: chunked (entropies included), beside the plain way (without).

8,192 tokens, a vocabulary of 131,072, hidden states of 896 (those of a model of half a billion parameters), float32 on
CPU. The plain way with entropies did not fit into 23 GB. Each way runs in a process of its own; what counts is how far
its peak resident memory grows beyond inputs and weights.

    python benchmarks/logprob_memory.py
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

TOKENS, VOCABULARY, HIDDEN = 8192, 131072, 896
WAYS = ("plain", "chunked")


def run(way: str) -> tuple[float, float]:
    """GiB beyond the inputs, and seconds, of one forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).div_(30.0).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if way == "plain":
        token_logprobs(hidden @ weight.T, targets).mean().backward()
    else:
        logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, targets, entropy_gradient=True)
        (logprobs.mean() + 0.01 * entropies.mean()).backward()
    seconds = time.perf_counter() - started
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, seconds


def main() -> None:
    """Measure both, print, write results/logprob_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    way = parser.parse_args().way
    if way is not None:
        print("RESULT", *run(way))
        return
    found: dict[str, dict[str, float]] = {}
    for name in WAYS:
        command = [sys.executable, __file__, "--way", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        memory, seconds = map(float, output.split("RESULT")[1].split())
        found[name] = {"peak_gib": memory, "seconds": seconds}
        print(f"{name:<10}{memory:>8.2f} GiB beyond inputs and weights {seconds:>8.1f} s")
    share = found["chunked"]["peak_gib"] / found["plain"]["peak_gib"]
    print(f"chunked takes {share:.3f} of the plain way's memory")
    result = {"tokens": TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN, "ways": found, "share": share}
    print("written to", write_result("logprob_memory", result))


if __name__ == "__main__":
    main()
