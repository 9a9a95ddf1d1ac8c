"""Learning from stale data: PPO on the quickstart task, synchronous and with a bound of 1, 4 and 8 versions.

With the correction of stale data (decoupled PPO) and without: the same sample budget, several seeds each. Finished runs
are kept in results/staleness.json; results/staleness.{png,md} are drawn from it.

    python benchmarks/staleness.py                 # all that is missing
    python benchmarks/staleness.py --draw          # plot and table alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from provenance import RESULTS
from training_runs import SEEDS, Run, RunFile, draw_runs, finish, table, train_quickstart

from rlhf_ray import PPOConfig

BOUNDS = (1, 4, 8)
SYNCHRONOUS = "synchronous"
NAMES = (SYNCHRONOUS, *(f"{bound}, {what}" for what in ("corrected", "not corrected") for bound in BOUNDS))


def train(name: str, seed: int, iterations: int, folder: Path) -> Run:
    """One run; the name says what differs from the synchronous one."""
    config = PPOConfig().debugging(seed=seed)
    if name != SYNCHRONOUS:
        bound, what = name.split(", ")
        config.rollouts(max_staleness=int(bound))
        config.training(behavior_weights="token" if what == "corrected" else "none")
    return train_quickstart(config, iterations, folder)


def draw(runs: list[Run]) -> None:
    """With correction on the left, without on the right, the synchronous runs in gray on both."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, what in zip(both, ("corrected", "not corrected"), strict=True):
        draw_runs(axes, [run for run in runs if run["max_staleness"] == SYNCHRONOUS], SYNCHRONOUS, color="0.6")
        for bound in BOUNDS:
            draw_runs(axes, [run for run in runs if run["max_staleness"] == f"{bound}, {what}"], f"bound {bound}")
        finish(axes)
        axes.set_title(what)
    axes.get_legend().remove()  # It would lie on curves, and is that of the other one.
    figure.savefig(RESULTS / "staleness.png", dpi=150)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    file = RunFile("staleness", "max_staleness")
    if not arguments.draw:
        for names in (NAMES[: len(BOUNDS) + 1], NAMES[len(BOUNDS) + 1 :]):  # What is not corrected comes last.
            file.complete(
                names, arguments.seeds, lambda name, seed, folder: train(name, seed, arguments.iterations, folder)
            )
    runs = sorted(file.runs(), key=lambda run: NAMES.index(run["max_staleness"]))
    draw(runs)
    text = table(runs, "max_staleness")
    (RESULTS / "staleness.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
