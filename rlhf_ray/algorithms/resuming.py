"""Before anything is started: a new run directory, or one whose run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_ray.checkpoints.checkpoint import Checkpoint
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.checkpoints.store import CheckpointStore
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.settings import Settings

if TYPE_CHECKING:
    from rlhf_ray.config import AlgorithmConfig

__all__ = ["RunStart", "check_same", "checkpoint_store", "open_run", "open_trial_run", "resolved_yaml"]

_LOG = logging.getLogger(__name__)
# Where a run lies, how it goes on and how it is shown is not what it is: one begun at a terminal may go on in a queue.
_MAY_DIFFER = {"reporting.run_dir", "reporting.progress", "checkpointing.resume"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run begins."""

    directory: RunDirectory
    checkpoint: Checkpoint | None
    """What it goes on from; ``None``: from the first iteration, or what Ray Tune restores."""
    has_history: bool = False
    """Whether the directory holds iterations of which only a restored checkpoint tells where the run goes on."""


def resolved_yaml(config: AlgorithmConfig) -> str:
    """All settings as YAML, without the folder's own name, so that the file reruns the run in a new one."""
    return config.copy().reporting(run_dir=None).checkpointing(resume="never").to_yaml()


def open_run(settings: Settings, *, algorithm: str, resolved: str) -> RunStart:
    """Make a run directory, or open the one of the run that goes on and find its newest complete checkpoint.

    Args:
        settings: The run's settings.
        algorithm: Its name, for the default name of a directory.
        resolved: All settings, as YAML.

    Raises:
        ConfigError: The directory holds a run, and ``checkpointing.resume`` does not allow to go on with it.
    """
    run_dir, resume = settings.reporting.run_dir, settings.checkpointing.resume
    if resume == "never" or run_dir is None or not RunDirectory.holds_a_run(run_dir):
        directory = RunDirectory.create(run_dir, algorithm=algorithm)
        directory.write_config(resolved)
        return RunStart(directory=directory, checkpoint=None)
    directory = RunDirectory.reopen(run_dir)
    if resume == "same":
        check_same(directory, resolved)
    checkpoint = checkpoint_store(settings, directory).newest()
    if checkpoint is None:
        _LOG.warning("%s holds no complete checkpoint; its run begins again", directory.path)
    directory.forget_after(0 if checkpoint is None else checkpoint.state().iteration)
    directory.write_config(resolved)
    return RunStart(directory=directory, checkpoint=checkpoint)


def open_trial_run(settings: Settings, *, algorithm: str, resolved: str) -> RunStart:
    """Make the run directory of a Ray Tune trial, or open it again: Tune starts a trial anew after a pause or failure.

    Args:
        settings: The trial's settings; ``reporting.run_dir`` is its own.
        algorithm: Its name.
        resolved: All settings, as YAML.
    """
    run_dir = settings.reporting.run_dir
    assert run_dir is not None, "a trial's run directory lies in its own folder"
    has_history = RunDirectory.holds_a_run(run_dir)
    directory = RunDirectory.reopen(run_dir) if has_history else RunDirectory.create(run_dir, algorithm=algorithm)
    directory.write_config(resolved)
    return RunStart(directory=directory, checkpoint=None, has_history=has_history)


def checkpoint_store(settings: Settings, directory: RunDirectory) -> CheckpointStore:
    """Where a run keeps its checkpoints."""
    return CheckpointStore(Folder.at(settings.checkpointing.path or directory.checkpoints))


def check_same(directory: RunDirectory, resolved: str) -> None:
    """Compare settings with those of the run in a directory.

    Args:
        directory: Where a run is.
        resolved: All settings, as YAML.

    Raises:
        ConfigError: They differ.
    """
    there = dict(_flat(yaml.safe_load(directory.config.read_text(encoding="utf-8")) or {}))
    here = dict(_flat(yaml.safe_load(resolved)))
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    differing = [name for name in names if name not in _MAY_DIFFER]
    if differing:
        listed = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differing)
        remedy = (
            f"holds a run with other settings: {listed}. Choose another folder, or set checkpointing.resume to any to "
            "go on with the new ones"
        )
        raise ConfigError("reporting.run_dir", str(directory.path), remedy)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections apart, every setting under its dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value
