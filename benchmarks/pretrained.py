"""The baseline on a real pretrained chat model: PPO with a critic and GRPO on SmolLM2-135M-Instruct, on CPUs.

    python benchmarks/pretrained.py                     # all that is missing of results/pretrained.json, then the plot
    python benchmarks/pretrained.py --tasks sums --algorithms PPO --seeds 0
    python benchmarks/pretrained.py --draw              # plot and table alone

Tasks, each with its training and held-out prompts in chat form:

- ``sums``: "What is 7 + 5?"; reward 1 where the last number of the answer is right.
- ``products``: "What is 7 * 5?"; the same, and harder.
- ``format``: one-digit sums again, in a form that the model was not taught: half of the reward for an answer that ends
  in ``Answer: N`` and nothing else, half for the right number there.

Every run samples the same number of completions. What counts as learning was written down before any run: in each seed
held-out greedy accuracy rises by at least 0.2, and the mean reward of the last two iterations is at least 0.15 above
that of the first two.

Exactness is part of each run: the largest difference of a token's log-probability between engine and learner, and,
after the last iteration, whether transformers continues held-out prompts greedily as the engine does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS, provenance
from smollm2 import make_model
from training_runs import SEEDS, Run, RunFile, draw_runs

import rlhf_ray

ITERATIONS = 12
ALGORITHMS = ("PPO", "GRPO")
_NUMBER = re.compile(r"-?[0-9]+")
_FORM = re.compile(r"(?s).*\bAnswer: ([0-9]+)\.?\s*")
_HELD_OUT = 20


def _rows(result: Callable[[int, int], int], question: str) -> list[dict[str, Any]]:
    """All 81 one-digit questions, in a fixed random order; the first 20 are held out."""
    pairs = list(itertools.product(range(1, 10), repeat=2))
    random.Random(0).shuffle(pairs)
    return [
        {"prompt": [{"role": "user", "content": question.format(a=a, b=b)}], "answer": str(result(a, b))}
        for a, b in pairs
    ]


def last_number(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of the answer is right."""
    found = [_NUMBER.findall(_text(completion)) for completion in completions]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]


def answer_form(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """0.5 for an answer that ends in ``Answer: N``, 1 where N is right too."""
    found = [_FORM.fullmatch(_text(completion)) for completion in completions]
    return [0.0 if one is None else 0.5 + 0.5 * (one[1] == right) for one, right in zip(found, answer, strict=True)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


TASKS: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[..., list[float]]]] = {
    "sums": (lambda: _rows(operator.add, "What is {a} + {b}?"), last_number),
    "products": (lambda: _rows(operator.mul, "What is {a} * {b}?"), last_number),
    "format": (lambda: _rows(operator.add, 'What is {a} + {b}? End with "Answer: " and the number.'), answer_form),
}


def config_of(algorithm: str, task: str, seed: int, model: Path, folder: Path) -> rlhf_ray.AlgorithmConfig:
    """The settings of a run: what a user would write for a model of this size."""
    rows, reward = TASKS[task]
    for name, part in {"held_out": rows()[:_HELD_OUT], "train": rows()[_HELD_OUT:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config: rlhf_ray.AlgorithmConfig = getattr(rlhf_ray, f"{algorithm}Config")()
    return (
        config.model(path=str(model))
        .data(path=str(folder / "train.jsonl"), eval_path=str(folder / "held_out.jsonl"), batch_size=16)
        .rollouts(group_size=4, max_prompt_tokens=64, max_new_tokens=16)
        .rewards(reward)
        .training(iterations=ITERATIONS, lr=5e-6, critic_lr=2e-5, num_minibatches=2)
        .learners(gradient_checkpointing=False, max_tokens_per_microbatch=1024)
        .debugging(seed=seed)
        .reporting(run_dir=str(folder / "run"), progress="plain", tensorboard=False)
    )


def train(name: str, seed: int, model: Path, folder: Path) -> Run:
    """One run; ``name`` is ``<task>/<algorithm>``."""
    task, algorithm = name.split("/")
    algo = config_of(algorithm, task, seed, model, folder).build()
    accuracy, results = {0: _accuracy(algo)}, []
    try:
        for number in range(1, ITERATIONS + 1):
            results.append(algo.train())
            if number % 3 == 0:
                accuracy[sum(each["rollouts"]["num_completions"] for each in results)] = _accuracy(algo)
        outcomes = algo.sample_evaluation()
        algo.export_hf(folder / "model")
    finally:
        algo.stop()
    learner = [each["learner"] for each in results]
    return {
        "accuracy": accuracy,
        "reward_mean": [each["rollouts"]["reward_mean"] for each in results],
        "sampling_logprob_diff_max": max(each["sampling_logprob_diff_max"] for each in learner),
        "greedy_differences": greedy_differences(folder / "model", outcomes),
        "timers": {
            key: sorted(each["timers"][key] for each in results)[len(results) // 2] for key in results[0]["timers"]
        },
        "origin": provenance(),
    }


def _accuracy(algo: Any) -> float:
    (metrics,) = algo.evaluate().values()
    return float(metrics["reward_mean"])


def greedy_differences(folder: Path, outcomes: Sequence[Any]) -> int:
    """How many held-out prompts transformers continues otherwise than the engine did, both greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    differing = 0
    for outcome in outcomes:
        prompt = outcome.group.prompt.token_ids.tolist()
        sampled = outcome.group.trajectories[0].token_ids.tolist()
        written = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=len(sampled), min_new_tokens=len(sampled)
        )
        differing += written[0, len(prompt) :].tolist() != sampled
    return differing


def draw(runs: Sequence[Run]) -> None:
    """A plot for each task: held-out accuracy, mean and range over the seeds."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3.4), layout="constrained", sharey=True)
    for panel, task in zip(axes, TASKS, strict=True):
        for algorithm in ALGORITHMS:
            draw_runs(panel, [run for run in runs if run["name"] == f"{task}/{algorithm}"], algorithm)
        panel.set(title=task, xlabel="completions sampled", ylim=(0, 1))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("held-out reward, greedy")
    axes[0].legend(loc="lower right", frameon=False)
    figure.savefig(RESULTS / "pretrained.png", dpi=150)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "rlhf_ray" / "smollm2")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    file = RunFile("pretrained", "name")
    if not arguments.draw:
        model, started = make_model(arguments.model), time.perf_counter()
        names = [f"{task}/{algorithm}" for task in arguments.tasks for algorithm in arguments.algorithms]
        file.complete(names, arguments.seeds, lambda name, seed, folder: train(name, seed, model, folder))
        print(f"{time.perf_counter() - started:.0f} s")
    draw(file.runs())


if __name__ == "__main__":
    main()
