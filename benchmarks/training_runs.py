"""Whole training runs on the quickstart task, as several benchmarks need them: train, keep what is finished, draw.

A run is a dictionary: what was run (the benchmark's own keys and ``seed``), ``accuracy`` by completions sampled,
``reward_mean`` by iteration, and where it comes from.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, provenance

from rlhf_ray import AlgorithmConfig

EVALUATIONS = 5
SEEDS = (0, 1, 2)
Run = dict[str, Any]


class RunFile:
    """A result file to which runs are added one by one, so that a benchmark that is cut short goes on later.

    Args:
        name: Of the file in ``results``, without its ending.
        key: Which entry of a run says what it is of.
    """

    def __init__(self, name: str, key: str) -> None:
        self._path = RESULTS / f"{name}.json"
        self._key = key

    def runs(self) -> list[Run]:
        """All finished runs."""
        runs: list[Run] = json.loads(self._path.read_text())["runs"] if self._path.exists() else []
        return runs

    def complete(self, names: Sequence[str], seeds: Sequence[int], train: Callable[[str, int, Path], Run]) -> None:
        """Make the runs that are missing, seed by seed, so that one that is cut short has all names."""
        for seed, name in itertools.product(seeds, names):
            runs = self.runs()
            if any((run[self._key], run["seed"]) == (name, seed) for run in runs):
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                run: Run = {self._key: name, "seed": seed} | train(name, seed, Path(folder))
            order = {known: place for place, known in enumerate(names)}
            runs = sorted([*runs, run], key=lambda run: (order.get(run[self._key], len(order)), run["seed"]))
            self._path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
            seconds = time.perf_counter() - started
            print(f"{name} seed {seed}: {list(run['accuracy'].values())} in {seconds:.0f} s", flush=True)


def train_quickstart(config: AlgorithmConfig, iterations: int, folder: Path) -> Run:
    """Train until as many completions are sampled as ``iterations`` have without a dropped group.

    The learning rate falls over that many iterations.
    """
    config.training(iterations=iterations)
    config.reporting(run_dir=str(folder / "run"), progress="off", tensorboard=False, completions_interval=0)
    algorithm = config.build()
    try:
        accuracy, sampled, budget = {0: _accuracy(algorithm)}, 0, None
        rewards = []
        while budget is None or sampled < budget:
            rollouts = algorithm.train()["rollouts"]
            kept = rollouts["num_completions"]
            budget = budget or kept * iterations
            dropped = rollouts["equal_reward_groups"] * kept // rollouts["num_groups"]
            before, sampled = sampled, sampled + kept + dropped
            rewards.append(rollouts["reward_mean"])
            if before * EVALUATIONS // budget < sampled * EVALUATIONS // budget:
                accuracy[sampled] = _accuracy(algorithm)
    finally:
        algorithm.stop()
    figures = {"iterations": len(rewards), "budget": budget, "accuracy": accuracy, "reward_mean": rewards}
    return figures | {"origin": provenance()}


def _accuracy(algorithm: Any) -> float:
    (metrics,) = algorithm.evaluate().values()
    return float(metrics["reward_mean"])


def draw_runs(axes: Any, runs: Sequence[Run], label: str, **style: Any) -> None:
    """Mean accuracy of some runs against completions sampled, and a band from the worst to the best."""
    if not runs:
        return
    # Runs that drop groups pass the evaluation points at slightly different counts: their means are drawn.
    curves = [run["accuracy"] for run in runs]
    steps = [statistics.mean(map(int, point)) for point in zip(*curves, strict=False)]
    values = list(zip(*(curve.values() for curve in curves), strict=False))
    means = [statistics.mean(value) for value in values]
    (line,) = axes.plot(steps, means, marker="o", markersize=3, label=label, **style)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12)


def finish(axes: Any) -> None:
    """Labels, scale, legend."""
    axes.set(xlabel="completions sampled", ylabel="held-out accuracy, greedy", ylim=(0.3, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, ncol=2)


def table(runs: Sequence[Run], key: str) -> str:
    """One row a kind of run: accuracy before and after, gain, reward of the last ten iterations."""
    lines = [
        f"| {key} | seeds | accuracy before | after, mean (min to max) | gain | reward | iterations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run[key] for run in runs):
        mine = [run for run in runs if run[key] == name]
        before = statistics.mean(run["accuracy"]["0"] for run in mine)
        after = [list(run["accuracy"].values())[-1] for run in mine]
        reward = statistics.mean(statistics.mean(run["reward_mean"][-10:]) for run in mine)
        iterations = statistics.mean(run["iterations"] for run in mine)
        gain = statistics.mean(after) - before
        lines.append(
            f"| {name} | {len(mine)} | {before:.3f} | {before + gain:.3f} ({min(after):.3f} to {max(after):.3f}) | "
            f"{gain:+.3f} | {reward:.3f} | {iterations:.0f} |"
        )
    return "\n".join(lines) + "\n"
