"""Before the loop: settings that cannot go together in ``evaluation`` and ``checkpointing``."""

from __future__ import annotations

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.held_out_sets import held_out_sets

__all__ = ["check_checkpointing", "check_evaluation_data", "check_evaluation_sampling"]


def check_checkpointing(settings: Settings) -> None:
    """A resume finds its folder, and the best checkpoint is among those measured."""
    checkpointing = settings.checkpointing
    if checkpointing.resume != "never" and settings.reporting.run_dir is None:
        raise ConfigError("checkpointing.resume", checkpointing.resume, "name the run's folder: reporting.run_dir")
    best = checkpointing.best_metric
    if best is None or not best.startswith("evaluation/"):
        return
    if settings.evaluation.interval == 0:
        raise ConfigError("checkpointing.best_metric", best, "set evaluation.interval, or it is never measured")
    if checkpointing.interval % settings.evaluation.interval:
        remedy = (
            f"with evaluation.interval = {settings.evaluation.interval} checkpoints are made that nothing measures; "
            "make checkpointing.interval a multiple of it"
        )
        raise ConfigError("checkpointing.interval", checkpointing.interval, remedy)
    names = [held_out.name for held_out in held_out_sets(settings.data)]
    if names and not any(best.startswith(f"evaluation/{name}/") for name in names):
        raise ConfigError("checkpointing.best_metric", best, f"there is no such held-out set; use {' or '.join(names)}")


def check_evaluation_data(settings: Settings) -> None:
    """Evaluation that is asked for has a held-out set."""
    if held_out_sets(settings.data):
        return
    for name, off in (("interval", 0), ("at_start", False), ("at_end", False)):
        value = getattr(settings.evaluation, name)
        if value != off:
            remedy = f"set data.eval_path to the held-out set, or {name} to {off}"
            raise ConfigError(f"evaluation.{name}", value, remedy)


def check_evaluation_sampling(settings: Settings) -> None:
    """Greedy decoding is one completion a prompt, from the whole distribution."""
    evaluation = settings.evaluation
    if 0 < evaluation.temperature < 0.01:
        remedy = "the engine makes 0.01 of it; use 0 for greedy decoding, or 0.01 and more"
        raise ConfigError("evaluation.temperature", evaluation.temperature, remedy)
    if evaluation.temperature > 0:
        return
    if evaluation.samples_per_prompt > 1:
        remedy = "greedy completions of a prompt are all the same; set evaluation.temperature, such as 0.6, or use 1"
        raise ConfigError("evaluation.samples_per_prompt", evaluation.samples_per_prompt, remedy)
    if evaluation.top_p != 1.0:
        remedy = "greedy decoding takes the likeliest token whatever top_p is; set evaluation.temperature, or use 1.0"
        raise ConfigError("evaluation.top_p", evaluation.top_p, remedy)
