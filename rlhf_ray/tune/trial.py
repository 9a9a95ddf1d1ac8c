"""What is different where an algorithm is a Ray Tune trial: its name, where it writes, what Tune reserves for it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from ray import cloudpickle

from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.rollouts.engine_spec import longest_completion

__all__ = ["TRIAL_CPUS", "Trial", "same_parts"]

TRIAL_CPUS = 0.1
"""CPUs that Tune reserves for a trial's own process.

Little, because trials that wait for resources hold it too: on a small machine more would leave nothing to wait for.
"""

_Config = TypeVar("_Config", bound=AlgorithmConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    name: str
    folder: Path
    """The trial's own, where its result.json is if that is on a file system of this machine."""
    cpus: float
    """What Tune reserved for the trial's own process."""

    @classmethod
    def of(cls, trainable: Any) -> Self | None:
        """The trial that a Trainable runs in; ``None`` outside of Tune."""
        storage = trainable._storage
        if storage is None:
            return None
        is_local = storage.storage_filesystem.type_name == "local"
        reserved = trainable.trial_resources
        return cls(
            name=trainable.trial_name,
            folder=Path(storage.trial_fs_path if is_local else storage.trial_working_directory),
            cpus=TRIAL_CPUS if reserved is None else float(reserved.required_resources.get("CPU", 0.0)),
        )

    def adapted(self, config: _Config) -> _Config:
        """The settings with folders of this trial's own, and the console left to Tune's table.

        Raises:
            ConfigError: ``checkpointing.resume`` is set: Tune itself decides what a trial resumes from.
        """
        reporting, checkpointing = config.settings.reporting, config.settings.checkpointing
        if checkpointing.resume != "never":
            remedy = "use never in a trial; tune.Tuner.restore(path, trainable=...) resumes a sweep"
            raise ConfigError("checkpointing.resume", checkpointing.resume, remedy)
        parent = self.folder if reporting.run_dir is None else Path(reporting.run_dir).expanduser().absolute()
        adapted = config.copy().reporting(
            run_dir=str(parent / self.name), progress="plain" if reporting.progress == "plain" else "off"
        )
        if checkpointing.path is not None:
            adapted.checkpointing(path=str(Folder.at(checkpointing.path) / self.name))
        return adapted


# Read by the trial itself, when they are needed; of evaluation the engines know the longest completion.
_LIVE = frozenset({"evaluation", "callbacks"})
# These decide which parts there are: a critic, greedy completions, functions that replicas and learners were sent.
_FIXED_TRAINING = frozenset({"advantage", "advantage_args", "loss", "loss_args"})
_OWN_FOLDERS = {"reporting": "run_dir", "checkpointing": "path"}


def same_parts(old: Settings, new: Settings) -> bool:
    """Whether the running parts of one trial serve another: only the learners' numbers and what is read here differ."""
    if longest_completion(old.rollouts, old.evaluation) != longest_completion(new.rollouts, new.evaluation):
        return False
    for section in fields(Settings):
        if section.name in _LIVE:
            continue
        before, after = getattr(old, section.name), getattr(new, section.name)
        names = {one.name for one in fields(before) if _differ(getattr(before, one.name), getattr(after, one.name))}
        if section.name == "training":
            names &= _FIXED_TRAINING
        if names - {_OWN_FOLDERS.get(section.name)}:
            return False
    return True


def _differ(before: Any, after: Any) -> bool:
    # A function of a script or a notebook comes to a trial as a copy, another one each time.
    return bool(before != after) and cloudpickle.dumps(before) != cloudpickle.dumps(after)
