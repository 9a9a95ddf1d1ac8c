"""``rlhf-ray evaluate``: measure a model on evaluation prompts."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from rlhf_ray.cli.measured_model import eval_path, measured_model
from rlhf_ray.cli.train import running, with_display
from rlhf_ray.command import Commands, add_command, add_settings, is_algorithm, load_config
from rlhf_ray.config.held_out_sets import held_out_sets
from rlhf_ray.errors import ConfigError

__all__ = ["add_evaluate_command"]


def add_evaluate_command(commands: Commands) -> None:
    """Add ``evaluate``."""
    evaluate = add_command(commands, "evaluate", _evaluate, "measure a model on held-out prompts; keeps no files")
    add_settings(
        evaluate,
        "CHECKPOINT | CONF.yaml",
        "a checkpoint, a run's folder (for its newest one) or a model's folder, with the settings of its run; "
        "or a YAML file; then settings that replace these",
    )
    evaluate.add_argument("--checkpoint", metavar="PATH", help="the same checkpoint, where CONF.yaml is given too")
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="[NAME=]DATASET",
        help="held-out set instead of data.eval_path, and what its metrics are called; may be given several times",
    )


def _evaluate(args: argparse.Namespace) -> int:
    measured = measured_model(args.conf, args.checkpoint)
    config = with_display(load_config(measured.conf, list(filter(is_algorithm, args.overrides))))
    if measured.model_path is not None:
        config.model(path=measured.model_path)
    config.apply_overrides(args.overrides)
    if args.data is not None:
        config.data(eval_path=eval_path(args.data))
    if not held_out_sets(config.settings.data):
        raise ConfigError("data.eval_path", None, "no evaluation prompts configured: name a held-out set, --data FILE")
    # The best checkpoint of a run may be that on a set which is not measured here.
    config.checkpointing(best_metric=None, interval=0, path=None)
    config.reporting(tensorboard=False, wandb_project=None, mlflow_experiment=None)
    config.reporting(completions_interval=0, timeline_interval=0)
    # What cannot be deleted must not take the place of the error that ended the run.
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-", ignore_cleanup_errors=True) as folder:
        config.reporting(run_dir=str(Path(folder) / "run"))
        build = config.build_algo
        if measured.checkpoint is not None:
            build = partial(config.algorithm_class.from_checkpoint, measured.checkpoint, config=config)
        with running(build, keeps_files=False) as algo:
            metrics = algo.evaluate()
    import rich

    from rlhf_ray.reporting.summary import show_evaluation

    show_evaluation(rich.get_console(), metrics)
    return 0
