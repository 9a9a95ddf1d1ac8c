"""What the learner makes of its two cores: useful tokens a second, beside bare PyTorch, and PPO's cost beside GRPO's.

The long-tail step: 32 prompts of 8 completions, geometric lengths of mean 97 and at most 500 tokens, the quickstart's
architecture. One process, the same sequences for all, in one run:

- ``learner``: ``Learner.update`` as a run does it, GRPO and PPO, one optimizer step and four;
- ``bare loop``: the same passes on the same microbatches with plain models, losses and optimizers of PyTorch;
- ``padded, input order``: the bare loop on batches of 16 in the order they came, padded to the longest of all, with
  whole logits: what a loop without a plan does.

    python benchmarks/learner_throughput.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from bare_loop import BareLoop, sequences_of, split
from provenance import write_result
from rank import learner_spec, one_rank

from rlhf_ray import GRPOConfig, PPOConfig
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.learner import Learner
from rlhf_ray.quickstart import model_path

PROMPTS, GROUP, PROMPT_TOKENS, MEAN, LONGEST = 32, 8, 12, 97, 500
MAX_TOKENS = 2048


def long_tail_batch(seed: int = 0) -> SequenceBatch:
    """Random ids at the lengths of the long-tail step."""
    rng = np.random.default_rng(seed)
    count = PROMPTS * GROUP
    lengths = np.minimum(rng.geometric(1 / MEAN, size=count), LONGEST).astype(np.int32)
    return sequences_of(
        PROMPT_TOKENS,
        lengths,
        token_ids=rng.integers(10, 250, size=int(lengths.sum()) + count * PROMPT_TOKENS).astype(np.int32),
        sampling_logprobs=np.full(int(lengths.sum()), -5.5, dtype=np.float32),
        rewards=rng.integers(0, 2, size=count).astype(np.float32),
        truncated=lengths == LONGEST,
        group_ids=np.repeat(np.arange(PROMPTS), GROUP),
    )


def all_work(batch: SequenceBatch) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    work: dict[str, Callable[[], object]] = {}
    for name, algorithm in (("GRPO", GRPOConfig), ("PPO", PPOConfig)):
        # At a learning rate that leaves the weights where they are.
        config = algorithm().training(lr=1e-9, critic_lr=1e-9, kl_coef=0.0).rollouts(max_new_tokens=LONGEST)
        learner = Learner(learner_spec(config, model_path()))
        bare = BareLoop(model_path(), critic=name == "PPO")
        for steps in (1, 4):
            own, rank, minibatches = split(batch, num_minibatches=steps, max_tokens=MAX_TOKENS)
            work[f"{name}, {steps} steps: learner"] = partial(learner.update, own, rank)
            work[f"{name}, {steps} steps: bare loop"] = partial(bare.planned, minibatches)
        if name == "GRPO":
            work["padded, input order"] = partial(bare.in_input_order, batch, 16)
    return work


def measure(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a slow spell of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if repeat:  # The first warms up.
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print a table, write results/learner_throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch = long_tail_batch()
    with one_rank():
        seconds = measure(all_work(batch), repeats)
    tokens = int(batch.lengths.sum())
    for name, value in seconds.items():
        print(f"{name:<28}{value:>8.2f} s {tokens / value:>9.0f} useful tokens/s")
    ratios = {
        f"{name}, {steps} steps: learner / bare loop": seconds[f"{name}, {steps} steps: bare loop"]
        / seconds[f"{name}, {steps} steps: learner"]
        for name in ("GRPO", "PPO")
        for steps in (1, 4)
    }
    ratios["GRPO learner / padded, input order"] = seconds["padded, input order"] / seconds["GRPO, 1 steps: learner"]
    ratios["PPO's time / GRPO's, 4 steps"] = seconds["PPO, 4 steps: learner"] / seconds["GRPO, 4 steps: learner"]
    for name, ratio in ratios.items():
        print(f"{name:<44}{ratio:>6.2f}")
    result = {"repeats": repeats, "tokens": tokens, "seconds": seconds, "ratios": ratios}
    print("written to", write_result("learner_throughput", result))


if __name__ == "__main__":
    main()
