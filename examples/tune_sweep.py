"""A sweep with Ray Tune over learning rates, with the built-in model and task (about 5 minutes on two cores).

::

    python examples/tune_sweep.py
    python examples/tune_sweep.py --trials 16 --iterations 60 --concurrent 4

An algorithm is a Tune ``Trainable``, and its settings are the search space: each can be a ``tune.grid_search`` or a
sampler. Every number in a result is a metric, with the same name as in ``metrics.jsonl``. ASHA evaluates each trial on
held-out sums and stops those that fall behind. Consecutive trials use the same engines and learners
(``reuse_actors``): if only values of the training section differ, no process is restarted.
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
    parser.add_argument("--iterations", type=int, default=18, help="iterations per trial (default: 18)")
    parser.add_argument("--concurrent", type=int, default=1, help="concurrent trials (default: 1)")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder of the sweep (default: runs)")
    parser.add_argument("--name", default=None, help="name of the sweep (default: PPO and the time)")
    return parser.parse_args(arguments)


def space(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fixed settings and the samplers; a ``PPOConfig`` works too, but adds all defaults to every table."""
    return {
        "training": {"iterations": args.iterations, "lr": tune.loguniform(*RATES)},
        # Other results repeat the newest evaluation, since Tune requires its metric in each result.
        "evaluation": {"interval": max(1, args.iterations // 6)},
        # Reservations, not limits: small enough that --concurrent determines how many trials run at once.
        "resources": {"cpus_per_replica": 0.2, "cpus_per_learner": 0.2, "cpus_per_reward_worker": 0.1},
    }


class Progress(tune.Callback):
    """Prints a line for each evaluation."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print the progress of a trial."""
        number = result["training_iteration"]
        if number % trial.config["evaluation"]["interval"] == 0:
            lr, accuracy = trial.config["training"]["lr"], result["evaluation"]["quickstart"]["reward_mean"]
            print(f"{trial}: learning rate {lr:.2e}, iteration {number:3d}, accuracy {accuracy:.1%}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial has ended."""
        print(f"{trial}: ended", flush=True)


def sweep(args: argparse.Namespace) -> tune.ResultGrid:
    """Run all trials."""
    ray.init(log_to_driver=False)  # Engines and learners log about a dozen lines per trial.
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
        # Tune's own tables contain every setting and every metric of every trial.
        run_config=tune.RunConfig(
            name=args.name, storage_path=str(args.storage.absolute()), verbose=0, callbacks=[Progress()]
        ),
    )
    return tuner.fit()


def table(results: tune.ResultGrid) -> str:
    """Format one line per trial, the best first."""
    finished = [result for result in results if result.error is None and METRIC in flat(result)]
    finished.sort(key=lambda result: flat(result)[METRIC], reverse=True)
    lines = ["learning rate   iterations     final accuracy   folder"]
    for result in finished:
        row = flat(result)
        lines.append(
            f"{result.config['training']['lr']:13.2e}   {row['training_iteration']:10d}   {row[METRIC]:16.1%}   "
            f"{result.path}"
        )
    failed = len(results) - len(finished)
    return "\n".join([*lines, f"{failed} trials failed"] if failed else lines)


def plot(results: tune.ResultGrid, file: Path) -> None:
    """Plot held-out accuracy over iterations, one curve per trial; brighter curves have higher learning rates."""
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
            curve = curve[(number == 1) | (number % interval == 0)]  # Other rows repeat the newest evaluation.
            axes.plot(curve["training_iteration"], curve[METRIC], color=shade.to_rgba(result.config["training"]["lr"]))
    axes.set(xlabel="iteration", ylabel="held-out accuracy", title="One curve per trial; ASHA stops some early")
    figure.colorbar(shade, ax=axes, label="learning rate")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def flat(result: tune.Result) -> dict[str, Any]:
    """Return the last result with the names of ``metrics.jsonl``."""
    from rlhf_ray.reporting.metrics import flatten

    return flatten(result.metrics or {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep and print its results."""
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
