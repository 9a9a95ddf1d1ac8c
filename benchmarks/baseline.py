"""The published baseline: PPO and its relatives on the quickstart task, several seeds each, the same sample budget.

Every run samples the same number of completions from the same model, those of groups that dynamic sampling drops
counted too; the learning rate falls over as many iterations as that is without a dropped group. Held-out accuracy is
greedy. Each finished run is kept in results/baseline.json, so that an interrupted benchmark goes on where
it stopped; the plot and the table in results/baseline.{png,md} and the curves of the algorithms' own pages in
results/curves are drawn from that file.

    python benchmarks/baseline.py                                   # all that is missing
    python benchmarks/baseline.py --algorithms GRPO RLOO --seeds 0  # some of it
    python benchmarks/baseline.py --draw                            # plot and table alone
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS, provenance

import rlhf_ray

ALGORITHMS = ("PPO", "GRPO", "RLOO", "DrGRPO", "DAPO", "GSPO", "ReinforcePP")
SEEDS = (0, 1, 2)
EVALUATIONS = 5
FILE = RESULTS / "baseline.json"
# What differs from an algorithm's own defaults, and why.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    # Its bounds are for means over thousands of tokens; here a completion has four.
    "GSPO": {"training": {"clip_low": 0.1, "clip_high": 0.1}},
}

Run = dict[str, Any]


def train(name: str, seed: int, iterations: int, folder: Path) -> Run:
    """One run from the embedded model; accuracy by completions sampled, mean training rewards."""
    config = getattr(rlhf_ray, f"{name}Config")()
    for section, values in CHANGES.get(name, {}).items():
        getattr(config, section)(**values)
    config.training(iterations=iterations).debugging(seed=seed)
    config.reporting(run_dir=str(folder / f"{name}-{seed}"), progress="off", tensorboard=False, completions_interval=0)
    algorithm = config.build()
    try:
        accuracy, sampled, budget = {0: _accuracy(algorithm)}, 0, None
        rewards = []
        while budget is None or sampled < budget:
            result = algorithm.train()
            rollouts = result["rollouts"]
            kept = rollouts["num_completions"]
            budget = budget or kept * iterations
            before, sampled = sampled, sampled + kept + _dropped(rollouts, kept / rollouts["num_groups"])
            rewards.append(rollouts["reward_mean"])
            if before * EVALUATIONS // budget < sampled * EVALUATIONS // budget:
                accuracy[sampled] = _accuracy(algorithm)
    finally:
        algorithm.stop()
    return {
        "algorithm": name,
        "seed": seed,
        "iterations": len(rewards),
        "budget": budget,
        "changes": CHANGES.get(name, {}),
        "accuracy": accuracy,
        "reward_mean": rewards,
    } | {"origin": provenance()}


def _dropped(rollouts: dict[str, Any], group_size: float) -> int:
    return int(rollouts["equal_reward_groups"] * group_size)


def _accuracy(algorithm: Any) -> float:
    (metrics,) = algorithm.evaluate().values()
    return float(metrics["reward_mean"])


def finished() -> list[Run]:
    """The runs in the result file."""
    return json.loads(FILE.read_text())["runs"] if FILE.exists() else []


def keep(runs: list[Run]) -> None:
    """Write the result file anew, runs in the order of the algorithms."""
    order = {name: place for place, name in enumerate(ALGORITHMS)}
    runs = sorted(runs, key=lambda run: (order.get(run["algorithm"], len(order)), run["seed"]))
    FILE.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def draw(runs: list[Run]) -> None:
    """Accuracy against completions: the mean over seeds, and a band from the worst to the best."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ALGORITHMS:
        draw_runs(axes, runs, name)
    finish(axes)
    figure.savefig(RESULTS / "baseline.png", dpi=150)
    curves = RESULTS / "curves"
    curves.mkdir(exist_ok=True)
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
        if name != "PPO":
            draw_runs(axes, runs, "PPO", color="0.7")
        draw_runs(axes, runs, name, color="C0")
        finish(axes)
        # Without the date and random ids, so that the same runs make the same file.
        with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure.savefig(curves / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def draw_runs(axes: Any, runs: list[Run], name: str, color: str | None = None) -> None:
    """The curve of one algorithm, where it was run."""
    # Runs that drop groups pass the evaluation points at slightly different counts: their means are drawn.
    curves = [run["accuracy"] for run in runs if run["algorithm"] == name]
    if not curves:
        return
    steps = [statistics.mean(map(int, point)) for point in zip(*curves, strict=False)]
    values = list(zip(*(curve.values() for curve in curves), strict=False))
    (line,) = axes.plot(steps, [statistics.mean(v) for v in values], marker="o", markersize=3, label=name, color=color)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12)


def finish(axes: Any) -> None:
    """Labels, scale, legend."""
    axes.set(xlabel="completions sampled", ylabel="held-out accuracy, greedy", ylim=(0.3, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, ncol=2)


def table(runs: list[Run]) -> str:
    """One row an algorithm: accuracy before and after, gain, reward of the last ten iterations."""
    lines = [
        "| algorithm | seeds | accuracy before | after, mean (min to max) | gain | reward | iterations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
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


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=100, help="budget: the completions of this many")
    parser.add_argument("--draw", action="store_true")
    arguments = parser.parse_args()
    runs = finished()
    if not arguments.draw:
        there = {(run["algorithm"], run["seed"]) for run in runs}
        # Seed by seed, so that a benchmark that is cut short has every algorithm.
        for seed, name in itertools.product(arguments.seeds, arguments.algorithms):
            if (name, seed) in there:
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                run = train(name, seed, arguments.iterations, Path(folder))
            # As read back: JSON's keys are text.
            runs.append(json.loads(json.dumps(run)))
            keep(runs)
            print(f"{name} seed {seed}: {run['accuracy']} in {time.perf_counter() - started:.0f} s", flush=True)
        runs = finished()
    draw(runs)
    (RESULTS / "baseline.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
