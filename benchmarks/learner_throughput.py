"""What the learner makes of its two cores: useful tokens a second, beside bare PyTorch, and PPO's cost beside GRPO's.

The long-tail step: 32 prompts of 8 completions, geometric lengths of mean 97 and at most 500 tokens, the quickstart's
architecture. One process, the same sequences for all, in one run:

- ``learner``: ``Learner.update`` as a run does it, GRPO and PPO, one optimiser step and four;
- ``bare loop``: the same passes on the same microbatches with plain models, losses and optimisers of PyTorch;
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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from provenance import write_result

from rlhf_ray import AlgorithmConfig, GRPOConfig, PPOConfig
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.learner import Learner, LearnerSpec
from rlhf_ray.learner.models import load_critic, load_policy
from rlhf_ray.learner.packing import UpdatePlan, plan_update
from rlhf_ray.plugins import advantage_plugin, loss_plugin
from rlhf_ray.quickstart import model_path

PROMPTS, GROUP, PROMPT_TOKENS, MEAN, LONGEST = 32, 8, 12, 97, 500
MAX_TOKENS = 2048
CPU = torch.device("cpu")


def long_tail_batch(seed: int = 0) -> SequenceBatch:
    """Random ids at the lengths of the long-tail step."""
    rng = np.random.default_rng(seed)
    count = PROMPTS * GROUP
    lengths = np.minimum(rng.geometric(1 / MEAN, size=count), LONGEST).astype(np.int32)
    prompts = np.full(count, PROMPT_TOKENS, dtype=np.int32)
    return SequenceBatch(
        token_ids=rng.integers(10, 250, size=int((lengths + prompts).sum())).astype(np.int32),
        prompt_lengths=prompts,
        completion_lengths=lengths,
        sampling_logprobs=np.full(int(lengths.sum()), -5.5, dtype=np.float32),
        staleness=np.zeros(int(lengths.sum()), dtype=np.int32),
        fresh=np.ones(count, dtype=np.bool_),
        rewards=rng.integers(0, 2, size=count).astype(np.float32),
        truncated=lengths == LONGEST,
        group_ids=np.repeat(np.arange(PROMPTS), GROUP),
        greedy_rewards=np.zeros(count, dtype=np.float32),
        in_loss=np.ones(count, dtype=np.bool_),
    )


def plan_of(batch: SequenceBatch, num_minibatches: int) -> UpdatePlan:
    """The split that a run would make."""
    return plan_update(
        batch.lengths.tolist(),
        batch.loss_lengths.tolist(),
        num_minibatches=num_minibatches,
        num_epochs=1,
        num_ranks=1,
        max_tokens=MAX_TOKENS,
        attention_length=1536.0,
        packed=False,
        seed=0,
    )


def learner_of(config: AlgorithmConfig) -> Learner:
    """A rank with the quickstart's model, at a learning rate that leaves it where it is."""
    training = config.training(lr=1e-9, critic_lr=1e-9, kl_coef=0.0).settings.training
    advantage = advantage_plugin(training.advantage, training.advantage_args)
    return Learner(
        LearnerSpec(
            training=training,
            advantage=advantage,
            loss=loss_plugin(training.loss, training.loss_args),
            policy_path=model_path(),
            critic_path=model_path() if advantage.needs_critic else None,
            lora=None,
            attn_implementation="auto",
            trust_remote_code=False,
            gradient_checkpointing=False,
            compile_backend=None,
            offload_reference=False,
            offload_optimizer=False,
            dtype="float32",
            wire_dtype="float32",
            temperature=1.0,
            max_new_tokens=LONGEST,
            max_staleness=0,
            total_steps=1000,
            on_gpu=False,
            timeline=False,
            num_threads=None,
        )
    )


class BareLoop:
    """Plain models and optimisers: a forward pass for the old policy (several steps), forward, backward, step."""

    def __init__(self, path: str, *, critic: bool) -> None:
        loading: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": False}
        self._models = [load_policy(path, **loading)]
        if critic:
            self._models.append(load_critic(path, **loading))
        self._optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-9, fused=True) for m in self._models]

    def planned(self, minibatches: list[list[Microbatch]], *, epochs: int = 1) -> None:
        """The learner's passes on the learner's microbatches."""
        with torch.no_grad():
            for index, minibatch in enumerate(minibatches):
                for micro in minibatch:
                    if len(self._models) > 1:
                        self._values(micro)
                    if index > 0:  # The first step's own pass is the old policy's.
                        self._logprobs(micro.input_ids, micro.targets, micro.kept)
        for minibatch in minibatches * epochs:
            for micro in minibatch:
                if len(self._models) > 1:
                    (self._values(micro).square() * 1e-3).mean().backward()
                chosen = self._logprobs(micro.input_ids, micro.targets, micro.kept).flatten()[micro.completion_index]
                (chosen * micro.mask).sum().div(1e5).backward()
            self._step()

    def in_input_order(self, batch: SequenceBatch, size: int) -> None:
        """One optimiser step over batches of ``size``, all padded to the longest sequence, with whole logits."""
        width = int(batch.lengths.max())
        ends = np.cumsum(batch.lengths)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, (end, length) in enumerate(zip(ends, batch.lengths, strict=True)):
            ids[row, :length] = torch.from_numpy(batch.token_ids[end - length : end].astype(np.int64))
        mask = torch.arange(width)[None, :] < torch.from_numpy(batch.lengths)[:, None]
        for part in range(0, len(batch), size):
            rows = ids[part : part + size]
            chosen = self._logprobs(rows, rows[:, 1:], None)
            (chosen * mask[part : part + size, 1:]).sum().div(1e5).backward()
        self._step()

    def _values(self, micro: Microbatch) -> torch.Tensor:
        values: torch.Tensor = self._models[1](input_ids=micro.input_ids, use_cache=False).logits
        return values

    def _logprobs(self, ids: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is None:
            logits = self._models[0](input_ids=ids, use_cache=False).logits[:, :-1]
        else:
            logits = self._models[0](input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)

    def _step(self) -> None:
        for model, optimizer in zip(self._models, self._optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


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
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch = long_tail_batch()
    work: dict[str, Callable[[], object]] = {}
    for name, config in (("GRPO", GRPOConfig), ("PPO", PPOConfig)):
        learner, bare = learner_of(config()), BareLoop(model_path(), critic=name == "PPO")
        for steps in (1, 4):
            plan = plan_of(batch, steps)
            own = batch.select(plan.sequences[0])
            minibatches = [
                [lay_out(own, rows, packed=False, device=CPU) for rows in minibatch.microbatches]
                for minibatch in plan.ranks[0].minibatches
            ]
            rank = plan.ranks[0]
            work[f"{name}, {steps} steps: learner"] = lambda a=learner, b=own, c=rank: a.update(b, c)
            work[f"{name}, {steps} steps: bare loop"] = lambda a=bare, b=minibatches: a.planned(b)
        if name == "GRPO":
            work["padded, input order"] = lambda a=bare: a.in_input_order(batch, 16)
    seconds = measure(work, repeats)
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
