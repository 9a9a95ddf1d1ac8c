"""The published baseline: PPO and its relatives on the quickstart task, several seeds each, the same sample budget.

Every run samples the same number of completions from the same model, those of groups that dynamic sampling drops
counted too; the learning rate falls over as many iterations as that is without a dropped group. Held-out accuracy is
greedy. Each finished run is kept in results/baseline.json, so that an interrupted benchmark goes on where it stopped;
the plot and the table in results/baseline.{png,md} and the curves of the algorithms' own pages in results/curves are
drawn from that file. After it, ``python docs/algorithm_tables.py`` puts the figures into the pages.

    python benchmarks/baseline.py                                   # all that is missing
    python benchmarks/baseline.py --algorithms GRPO RLOO --seeds 0  # some of it
    python benchmarks/baseline.py --draw                            # plot and table alone
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from provenance import RESULTS
from training_runs import SEEDS, Run, RunFile, draw_runs, finish, table, train_quickstart

import rlhf_ray

ALGORITHMS = ("PPO", "GRPO", "RLOO", "DrGRPO", "DAPO", "GSPO", "ReinforcePP")
# What differs from an algorithm's own defaults, and why.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    # Its bounds are for means over thousands of tokens; here a completion has four.
    "GSPO": {"training": {"clip_low": 0.1, "clip_high": 0.1}},
}


def train(name: str, seed: int, iterations: int, folder: Path) -> Run:
    """One run of an algorithm."""
    config = getattr(rlhf_ray, f"{name}Config")()
    changes = CHANGES.get(name, {})
    for section, values in changes.items():
        getattr(config, section)(**values)
    return {"changes": changes} | train_quickstart(config.debugging(seed=seed), iterations, folder)


def draw(runs: list[Run]) -> None:
    """The plot of all algorithms, and one an algorithm beside PPO for its own page."""
    of = {
        name: [run for run in runs if run["algorithm"] == name] for name in dict.fromkeys(r["algorithm"] for r in runs)
    }
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ALGORITHMS:
        draw_runs(axes, of.get(name, []), name)
    finish(axes)
    figure.savefig(RESULTS / "baseline.png", dpi=150)
    curves = RESULTS / "curves"
    curves.mkdir(exist_ok=True)
    for name, mine in of.items():
        # Without the date and random ids, so that the same runs make the same file.
        with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
            if name != "PPO":
                draw_runs(axes, of.get("PPO", []), "PPO", color="0.7")
            draw_runs(axes, mine, name, color="C0")
            finish(axes)
            figure.savefig(curves / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=100, help="budget: the completions of this many")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    file = RunFile("baseline", "algorithm")
    if not arguments.draw:
        file.complete(
            arguments.algorithms,
            arguments.seeds,
            lambda name, seed, folder: train(name, seed, arguments.iterations, folder),
        )
    draw(file.runs())
    text = table(file.runs(), "algorithm")
    (RESULTS / "baseline.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
