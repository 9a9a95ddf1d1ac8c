"""What the settings of the critic do to PPO on the quickstart task: the same sample budget, several seeds each.

One setting, or a pair that belongs together, differs from the quickstart's own. Finished runs are kept in
results/critics.json; results/critics.{png,md} are drawn from it, with the runs of PPO in results/baseline.json.

    python benchmarks/critics.py                 # all that is missing
    python benchmarks/critics.py --draw          # plot and table alone
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS
from training_runs import SEEDS, Run, RunFile, draw_runs, finish, table, train_quickstart

from rlhf_ray import PPOConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "critic_lambda 1": {"critic_lambda": 1.0},
    # A completion has about five tokens here, so that 4 makes a lambda of 0.95.
    "lambda_alpha 4, critic_lambda 1": {"lambda_alpha": 4.0, "critic_lambda": 1.0},
    "critic_epochs 2": {"critic_epochs": 2},
    "warm-up to 0.3 of the variance": {"critic_warmup_iterations": 10, "critic_warmup_explained_variance": 0.3},
    "value_bins 51": {"value_bins": 51, "value_range": (0.0, 1.0), "value_clip": None},
    "nll_coef 0.1": {"nll_coef": 0.1},
}


def train(name: str, seed: int, iterations: int, folder: Path) -> Run:
    """One run of a variant."""
    config = PPOConfig().training(**VARIANTS[name]).debugging(seed=seed)
    return {"changes": VARIANTS[name]} | train_quickstart(config, iterations, folder)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    file = RunFile("critics", "variant")
    if not arguments.draw:
        file.complete(
            arguments.variants,
            arguments.seeds,
            lambda name, seed, folder: train(name, seed, arguments.iterations, folder),
        )
    usual = [{"variant": "the quickstart's"} | run for run in RunFile("baseline", "algorithm").runs()]
    runs = [run for run in usual if run["algorithm"] == "PPO"] + file.runs()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(run["variant"] for run in runs):
        draw_runs(axes, [run for run in runs if run["variant"] == name], name)
    finish(axes)
    figure.savefig(RESULTS / "critics.png", dpi=150)
    text = table(runs, "variant")
    (RESULTS / "critics.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
