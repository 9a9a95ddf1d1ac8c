"""A sweep with Ray Tune: which learning rate is best for the built-in model and task (about 5 minutes on two cores).

::

    python examples/tune_sweep.py
    python examples/tune_sweep.py --trials 16 --iterations 60 --concurrent 4

An algorithm is a Tune ``Trainable`` and its settings are the search space: each may be a ``tune.grid_search`` or a
sampler, and any number of a result is a metric, under the name that it has in ``metrics.jsonl``. ASHA measures each
trial on held-out sums and stops those that fall behind. All trials of one place use the same engines and learners
(``reuse_actors``): where only numbers of the training section differ, nothing has to be started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from rlhf_ray import PPO

METRIC = "evaluation/quickstart/reward_mean"
RATES = (2e-5, 2e-3)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6, help="learning rates to try (default: 6)")
    parser.add_argument("--iterations", type=int, default=18, help="iterations of a trial to its end (default: 18)")
    parser.add_argument("--concurrent", type=int, default=1, help="trials side by side (default: 1)")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder of the sweep (default: runs)")
    parser.add_argument("--name", default=None, help="name of the sweep (default: PPO and the time)")
    return parser.parse_args(arguments)


def space(args: argparse.Namespace) -> dict[str, Any]:
    """What all trials share, and what each one draws; a ``PPOConfig`` would do too, its defaults in every table."""
    return {
        "training": {"iterations": args.iterations, "lr": tune.loguniform(*RATES)},
        # In between a result repeats the newest evaluation: Tune wants its metric in each.
        "evaluation": {"interval": max(1, args.iterations // 6)},
        # Reservations, not limits: so small that --concurrent alone decides how many trials run side by side.
        "resources": {"cpus_per_replica": 0.2, "cpus_per_learner": 0.2, "cpus_per_reward_worker": 0.1},
    }


class Progress(tune.Callback):
    """Prints a line for each evaluation."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell how far a trial has come."""
        number = result["training_iteration"]
        if number % trial.config["evaluation"]["interval"] == 0:
            lr, accuracy = trial.config["training"]["lr"], result["evaluation"]["quickstart"]["reward_mean"]
            print(f"{trial}: learning rate {lr:.2e}, iteration {number:3d}, {accuracy:.1%} right", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell that a trial has ended."""
        print(f"{trial}: ended", flush=True)


def sweep(args: argparse.Namespace) -> tune.ResultGrid:
    """Run all trials."""
    ray.init(log_to_driver=False)  # The engines' and learners' own messages, a dozen lines a trial.
    tuner = tune.Tuner(
        PPO,
        param_space=space(args),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=args.trials,
            reuse_actors=True,
            search_alg=BasicVariantGenerator(max_concurrent=args.concurrent, random_state=0),
            scheduler=ASHAScheduler(max_t=args.iterations, grace_period=max(1, args.iterations // 3)),
        ),
        # Tune's own tables hold every setting and every figure of every trial.
        run_config=tune.RunConfig(
            name=args.name, storage_path=str(args.storage.absolute()), verbose=0, callbacks=[Progress()]
        ),
    )
    return tuner.fit()


def table(results: tune.ResultGrid) -> str:
    """One line a trial, the best first."""
    finished = [result for result in results if result.error is None and METRIC in flat(result)]
    finished.sort(key=lambda result: flat(result)[METRIC], reverse=True)
    lines = ["learning rate   iterations   right at the end   folder"]
    for result in finished:
        row = flat(result)
        lines.append(
            f"{result.config['training']['lr']:13.2e}   {row['training_iteration']:10d}   {row[METRIC]:16.1%}   "
            f"{result.path}"
        )
    failed = len(results) - len(finished)
    return "\n".join([*lines, f"{failed} trials failed"] if failed else lines)


def plot(results: tune.ResultGrid, file: Path) -> None:
    """Draw held-out accuracy over iterations, one curve a trial, the brighter the higher its learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    shade = plt.cm.ScalarMappable(LogNorm(*RATES), "viridis")
    for result in results:
        curve = result.metrics_dataframe
        if curve is not None and METRIC in curve:
            number, interval = curve["training_iteration"], result.config["evaluation"]["interval"]
            curve = curve[(number == 1) | (number % interval == 0)]  # In between, the newest evaluation is repeated.
            axes.plot(curve["training_iteration"], curve[METRIC], color=shade.to_rgba(result.config["training"]["lr"]))
    axes.set(xlabel="iteration", ylabel="right on held-out sums", title="A curve a trial; ASHA stops some early")
    figure.colorbar(shade, ax=axes, label="learning rate")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def flat(result: tune.Result) -> dict[str, Any]:
    """The last result under the names of ``metrics.jsonl``."""
    from rlhf_ray.reporting.metrics import flatten

    return flatten(result.metrics or {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, then show what came out."""
    args = parse(arguments)
    results = sweep(args)
    print(table(results))
    file = Path(results.experiment_path) / "sweep.png"
    try:
        plot(results, file)
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib")
    else:
        print(f"plot: {file}")
    print(f"best run: {results.get_best_result().path}")


if __name__ == "__main__":
    main()
