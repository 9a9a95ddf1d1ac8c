"""The published baseline: PPO and its relatives on the quickstart task, several seeds each, the same sample budget.

Every run samples as many completions (batch, group and iterations of the quickstart) from the same model. Held-out
accuracy is greedy. Each finished run is kept in results/baseline.json, so that an interrupted benchmark goes on where
it stopped; the plot and the table in results/baseline.{png,md} are drawn from that file.

    python benchmarks/baseline.py                                   # all that is missing
    python benchmarks/baseline.py --algorithms GRPO RLOO --seeds 0  # some of it
    python benchmarks/baseline.py --draw                            # plot and table alone
"""

from __future__ import annotations

import argparse
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
EVALUATE_EVERY = 20
FILE = RESULTS / "baseline.json"
# What differs from an algorithm's own defaults, and why.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    # Its bounds are for means over thousands of tokens; here a completion has four.
    "GSPO": {"training": {"clip_low": 0.1, "clip_high": 0.1}},
}

Run = dict[str, Any]


def train(name: str, seed: int, iterations: int, folder: Path) -> Run:
    """One run from the embedded model; accuracy by iteration, mean training reward, seconds."""
    config = getattr(rlhf_ray, f"{name}Config")()
    for section, values in CHANGES.get(name, {}).items():
        getattr(config, section)(**values)
    config.training(iterations=iterations).debugging(seed=seed)
    config.reporting(run_dir=str(folder / f"{name}-{seed}"), progress="off", tensorboard=False, completions_interval=0)
    algorithm = config.build()
    try:
        accuracy = {0: _accuracy(algorithm)}
        rewards, started = [], time.perf_counter()
        training_s = 0.0
        for iteration in range(1, iterations + 1):
            result = algorithm.train()
            rewards.append(result["rollouts"]["reward_mean"])
            training_s += result["timers"]["iteration_s"]
            if iteration % EVALUATE_EVERY == 0 or iteration == iterations:
                accuracy[iteration] = _accuracy(algorithm)
    finally:
        algorithm.stop()
    return {
        "algorithm": name,
        "seed": seed,
        "iterations": iterations,
        "changes": CHANGES.get(name, {}),
        "accuracy": accuracy,
        "reward_mean": rewards,
        "iteration_s_mean": training_s / iterations,
        "wall_s": time.perf_counter() - started,
    } | {"origin": provenance()}


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
    """Accuracy against iterations: the mean over seeds, and a band from the worst to the best."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        curves = [run["accuracy"] for run in runs if run["algorithm"] == name]
        steps = sorted({int(step) for curve in curves for step in curve})
        values = [[curve[str(step)] for curve in curves if str(step) in curve] for step in steps]
        (line,) = axes.plot(steps, [statistics.mean(v) for v in values], marker="o", markersize=3, label=name)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.12)
    axes.set(xlabel="iteration (256 completions each)", ylabel="held-out accuracy, greedy", ylim=(0.3, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False, ncol=2)
    figure.savefig(RESULTS / "baseline.png", dpi=150)


def table(runs: list[Run]) -> str:
    """One row an algorithm: accuracy before and after, gain, training reward, seconds an iteration."""
    lines = [
        "| algorithm | seeds | accuracy before | after, mean (min to max) | gain | reward, last 10 | s an iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        before = statistics.mean(run["accuracy"]["0"] for run in mine)
        after = [list(run["accuracy"].values())[-1] for run in mine]
        reward = statistics.mean(statistics.mean(run["reward_mean"][-10:]) for run in mine)
        seconds = statistics.mean(run["iteration_s_mean"] for run in mine)
        lines.append(
            f"| {name} | {len(mine)} | {before:.3f} | {statistics.mean(after):.3f} ({min(after):.3f} to "
            f"{max(after):.3f}) | {statistics.mean(after) - before:+.3f} | {reward:.3f} | {seconds:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--draw", action="store_true")
    arguments = parser.parse_args()
    runs = finished()
    if not arguments.draw:
        there = {(run["algorithm"], run["seed"], run["iterations"]) for run in runs}
        # Seed by seed, so that a benchmark that is cut short has every algorithm.
        wanted = [(name, seed, arguments.iterations) for seed in arguments.seeds for name in arguments.algorithms]
        for name, seed, iterations in wanted:
            if (name, seed, iterations) in there:
                continue
            with tempfile.TemporaryDirectory() as folder:
                run = train(name, seed, iterations, Path(folder))
            # As read back: JSON's keys are text.
            runs.append(json.loads(json.dumps(run)))
            keep(runs)
            print(f"{name} seed {seed}: {run['accuracy']} in {run['wall_s']:.0f} s", flush=True)
        runs = finished()
    draw(runs)
    (RESULTS / "baseline.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
