"""The quickstart's learning curve: quickstart.png and quickstart.json of a run.

python benchmarks/quickstart.py                 # trains with the quickstart's own settings; writes to results/
python benchmarks/quickstart.py runs/ppo-...    # draws a run that is there; writes to its directory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS, write_result

from rlhf_ray import PPOConfig
from rlhf_ray.quickstart import model_path

HELD_OUT = "evaluation/quickstart/reward_mean"


def read_run(run_dir: Path) -> list[dict[str, Any]]:
    """One flat dictionary an iteration."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def accuracy_before(path: str) -> float:
    """Greedy held-out accuracy of the model that the run started from."""
    from transformers import Qwen2ForCausalLM

    from rlhf_ray.quickstart.make_model import measure
    from rlhf_ray.quickstart.task import eval_rows

    return measure(Qwen2ForCausalLM.from_pretrained(path), eval_rows()).greedy


def draw(rows: list[dict[str, Any]], held_out: dict[int, float], path: Path) -> None:
    """Mean training reward of each iteration, and greedy held-out accuracy where it was measured."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    iterations = [row["training_iteration"] for row in rows]
    axes.plot(
        iterations, [row["rollouts/reward_mean"] for row in rows], color="#9aa7b8", label="training reward, sampled"
    )
    axes.plot(list(held_out), list(held_out.values()), color="#c2410c", marker="o", label="held-out accuracy, greedy")
    axes.set(xlabel="iteration", ylabel="share of sums right", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train or read, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="?", type=Path)
    run_dir = parser.parse_args().run_dir
    folder = run_dir or RESULTS
    if run_dir is None:
        run_dir = Path(tempfile.mkdtemp()) / "run"
        command = [sys.executable, "-c", "import sys; from rlhf_ray.cli import main; sys.exit(main(sys.argv[1:]))"]
        subprocess.run([*command, "quickstart", f"reporting.run_dir={run_dir}"], check=True)
    rows = read_run(run_dir)
    settings = PPOConfig.from_yaml(run_dir / "config.yaml").settings
    before = accuracy_before(settings.model.path or str(model_path()))
    held_out = {0: before} | {row["training_iteration"]: row[HELD_OUT] for row in rows if HELD_OUT in row}
    draw(rows, held_out, folder / "quickstart.png")
    result = {
        "seed": settings.debugging.seed,
        "iterations": len(rows),
        "held_out_accuracy": held_out,
        "training_reward_last_10": sum(row["rollouts/reward_mean"] for row in rows[-10:]) / len(rows[-10:]),
        "sampling_logprob_diff_max": max(row["learner/sampling_logprob_diff_max"] for row in rows),
        "iteration_s_median": sorted(row["timers/iteration_s"] for row in rows)[len(rows) // 2],
    }
    print("written to", write_result("quickstart", result, folder), "and quickstart.png")


if __name__ == "__main__":
    main()
