"""Learning curves of the quickstart: a picture and a JSON file of its runs.

python benchmarks/quickstart.py                                           # trains; writes quickstart.* to results/
python benchmarks/quickstart.py --environment calculator --seeds 0 1 2    # writes quickstart_calculator.*
python benchmarks/quickstart.py runs/ppo-...                              # draws runs that are there, in their folder
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS, write_result

from rlhf_ray import PPOConfig


def train(seed: int, environment: str | None) -> tuple[Path, float]:
    """Run ``rlhf-ray quickstart``; returns its run directory, and the seconds of the whole command."""
    run_dir = Path(tempfile.mkdtemp()) / f"seed{seed}"
    command = [sys.executable, "-m", "rlhf_ray.cli", "quickstart"]
    command += [] if environment is None else ["--environment", environment]
    overrides = [f"debugging.seed={seed}", "evaluation.at_start=true", f"reporting.run_dir={run_dir}"]
    started = time.perf_counter()
    subprocess.run([*command, *overrides], check=True)
    return run_dir, time.perf_counter() - started


def read_run(run_dir: Path) -> dict[str, Any]:
    """What a run's metrics say of its learning."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = {
        row["training_iteration"]: value
        for row in rows
        for key, value in row.items()
        if key.startswith("evaluation/") and key.endswith("/reward_mean")
    }
    trained = [row for row in rows if row["training_iteration"] > 0]
    return {
        "seed": PPOConfig.from_yaml(run_dir / "config.yaml").settings.debugging.seed,
        "iterations": len(trained),
        "held_out_accuracy": held_out,
        "training_reward": [row["rollouts/reward_mean"] for row in trained],
        "sampling_logprob_diff_max": max(row["learner/sampling_logprob_diff_max"] for row in trained),
        "iteration_s_median": sorted(row["timers/iteration_s"] for row in trained)[len(trained) // 2],
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean training reward of each iteration, and greedy held-out accuracy where it was measured."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for number, run in enumerate(runs):
        reward, held_out = run["training_reward"], run["held_out_accuracy"]
        # One entry per kind of curve in the legend.
        of_sampled, of_greedy = ("training reward, sampled", "held-out accuracy, greedy") if number == 0 else ("", "")
        axes.plot(range(1, len(reward) + 1), reward, color="#9aa7b8", alpha=0.6, label=of_sampled)
        axes.plot(list(held_out), list(held_out.values()), color="#c2410c", marker="o", ms=4, label=of_greedy)
    axes.set(xlabel="iteration", ylabel="share of sums right", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train or read, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="*", type=Path)
    parser.add_argument("--environment", choices=["calculator"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    runs, folder = [read_run(run_dir) for run_dir in arguments.run_dirs], RESULTS
    if runs:
        folder = arguments.run_dirs[0]
    for seed in () if runs else arguments.seeds:
        run_dir, seconds = train(seed, arguments.environment)
        runs.append(read_run(run_dir) | {"command_s": seconds})
    name = "quickstart" if arguments.environment is None else f"quickstart_{arguments.environment}"
    draw(runs, folder / f"{name}.png")
    print("written to", write_result(name, {"runs": runs}, folder), f"and {name}.png")


if __name__ == "__main__":
    main()
