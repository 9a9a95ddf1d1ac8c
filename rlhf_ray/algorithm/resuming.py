"""Opens a run directory: a new one, or that of a run which is resumed from its newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointStore
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.config.names import with_todays_names
from rlhf_ray.config.nested import flatten
from rlhf_ray.config.plain_values import plain_value
from rlhf_ray.config.settings import CheckpointingSettings, Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_directory import RunDirectory, RunLock

if TYPE_CHECKING:
    from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["RunStart", "check_same", "open_run", "open_trial_run", "resolved_yaml"]

_LOG = logging.getLogger(__name__)
# Where a run lies, how it resumes and how it is shown is not what it is: one begun at a terminal may resume in a queue.
_MAY_DIFFER = {"reporting.run_dir", "reporting.progress", "checkpointing.resume"}
_PATH = "checkpointing.path"
# Tune may restart a trial while the actor that had it before is still stopping its parts.
_TRIAL_WAIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run begins."""

    directory: RunDirectory
    lock: RunLock
    """Keeps other drivers out until it is released."""
    store: CheckpointStore
    resolved: str
    """All settings, as YAML."""
    checkpoint: Checkpoint | None = None
    """What it resumes from; ``None``: from the first iteration, or what Ray Tune restores."""
    resumes: bool = False
    """Whether the directory held the run before: what it tells of that stays until :meth:`adopt_run`."""
    has_history: bool = False
    """Whether the directory holds iterations of which only a restored checkpoint tells where the run continues."""

    def adopt_run(self, iteration: int) -> None:
        """Let the directory tell of the run that continues, once that is certain; with no iteration it begins again."""
        if iteration > 0:
            self.directory.truncate_after(iteration)
        elif (aside := self.directory.archive()) is not None:
            _LOG.warning("the run in %s begins again; what it had reported is in %s", self.directory.path, aside)
        self.directory.write_config(self.resolved)


def resolved_yaml(config: AlgorithmConfig) -> str:
    """All settings as YAML, without the folder's own name, so that the file reruns the run in a new one."""
    return config.copy().reporting(run_dir=None).checkpointing(resume="never").to_yaml()


def open_run(config: AlgorithmConfig) -> RunStart:
    """Make a run directory, or open the one of the run that resumes and find its newest complete checkpoint.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: The directory holds a run, and ``checkpointing.resume`` does not allow to continue it; another
            driver is writing it; there is nothing to resume from; or checkpoints cannot be written.
    """
    run_dir, checkpointing = config.settings.reporting.run_dir, config.settings.checkpointing
    _try_out(checkpointing)
    resumes = checkpointing.resume != "never" and run_dir is not None and _holds_a_run(config, run_dir)
    with _locked(_directory(config, reopen=resumes)) as (directory, lock):
        store, resolved = _store_and_resolved(config, directory, _recorded(directory) if resumes else {})
        start = RunStart(directory=directory, lock=lock, store=store, resolved=resolved, resumes=resumes)
        if not resumes:
            if checkpointing.interval > 0 and store.is_taken():
                remedy = f"{store.folder} holds checkpoints of another run; give this one a folder of another name"
                raise ConfigError("reporting.run_dir", str(directory.path), remedy)
            directory.write_config(resolved)
            return start
        if checkpointing.resume == "same":
            check_same(directory, resolved, algorithm_name=config.algorithm_name)
        checkpoint = store.newest()
        if checkpoint is None:
            _check_may_begin_again(checkpointing, directory, store)
        return replace(start, checkpoint=checkpoint)


def open_trial_run(config: AlgorithmConfig) -> RunStart:
    """Make the run directory of a Ray Tune trial, or open it again: Tune restarts a trial after a pause or failure.

    Args:
        config: The trial's settings; ``reporting.run_dir`` is its own.

    Raises:
        ConfigError: Another driver is writing the directory, or checkpoints cannot be written.
    """
    run_dir = config.settings.reporting.run_dir
    assert run_dir is not None, "a trial's run directory lies in its own folder"
    _try_out(config.settings.checkpointing)
    has_history = RunDirectory.holds_a_run(run_dir)
    with _locked(_directory(config, reopen=has_history), wait_s=_TRIAL_WAIT_S) as (directory, lock):
        store, resolved = _store_and_resolved(config, directory, {})
        if not has_history:
            directory.write_config(resolved)
        return RunStart(directory=directory, lock=lock, store=store, resolved=resolved, has_history=has_history)


def check_same(directory: RunDirectory, resolved: str, *, algorithm_name: str) -> None:
    """Compare settings with those of the run in a directory.

    Args:
        directory: Where a run is.
        resolved: All settings, as YAML.
        algorithm_name: What the run here is called, whichever module or file its configuration class is in.

    Raises:
        ConfigError: They differ.
    """
    here = flatten(yaml.safe_load(resolved))
    # A setting that the run does not know is one that came later: it ran as that is by default.
    defaults = {name: plain_value(value) for name, value in Settings()}
    recorded = flatten(with_todays_names(_recorded(directory)))
    there: dict[str, Any] = {name: defaults.get(name) for name in here} | recorded
    here[_PATH] = _own_path(here.get(_PATH), run_name=directory.name, recorded=there.get(_PATH))
    there[_PATH] = None if there.get(_PATH) is None else Folder.at(there[_PATH]).location
    if _class_name(there.get("algorithm")) in (algorithm_name, _class_name(here["algorithm"])):
        there["algorithm"] = here["algorithm"]
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    differing = [name for name in names if name not in _MAY_DIFFER]
    if differing:
        listed = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differing)
        remedy = (
            f"holds a run with other settings: {listed}. Choose another folder, or set checkpointing.resume to any to "
            "continue with the new ones"
        )
        raise ConfigError("reporting.run_dir", str(directory.path), remedy)


def _class_name(algorithm: Any) -> str:
    """The class that ``module:Class`` or ``file.py:Class`` names, wherever it is imported from; else the text."""
    return str(algorithm).rpartition(":")[2]


def _directory(config: AlgorithmConfig, *, reopen: bool) -> RunDirectory:
    run_dir = config.settings.reporting.run_dir
    if reopen and run_dir is not None:
        return RunDirectory.reopen(run_dir)
    return RunDirectory.create(run_dir, algorithm=config.algorithm_name.lower())


@contextmanager
def _locked(directory: RunDirectory, *, wait_s: float = 0.0) -> Iterator[tuple[RunDirectory, RunLock]]:
    """Keep other drivers out, unless what is done here fails."""
    lock = RunLock.take(directory.path, wait_s=wait_s)
    try:
        yield directory, lock
    except BaseException:
        lock.release()
        raise


def _holds_a_run(config: AlgorithmConfig, run_dir: str) -> bool:
    """Whether a run came as far as to report something, or to complete a checkpoint wherever it keeps them."""
    directory = RunDirectory.at(run_dir)
    if RunDirectory.holds_a_run(run_dir) or not directory.config.exists():
        return RunDirectory.holds_a_run(run_dir)
    return _store_and_resolved(config, directory, _recorded(directory))[0].newest() is not None


def _check_may_begin_again(
    checkpointing: CheckpointingSettings, directory: RunDirectory, store: CheckpointStore
) -> None:
    """Tell a run that ended before its first checkpoint from one whose checkpoints are lost, or lie elsewhere.

    A job that is queued again begins again in the first case. The second checkpoint is begun when the first is
    complete: a run that came this far had one. A user who asks for a resume by hand has a checkpoint in mind.
    """
    last, interval = directory.last_iteration(), checkpointing.interval
    had_one = interval > 0 and last >= 2 * interval
    if last == 0 or (checkpointing.resume == "same" and not had_one):
        _LOG.warning("%s: no complete checkpoint in %s; the run begins again", directory.path, store.folder)
        return
    remedy = (
        f"it reported {last} iterations, and there is no complete checkpoint of it in {store.folder} to resume from. "
        "Where that lies elsewhere, name its folder with checkpointing.path; to begin again, name another run "
        "directory"
    )
    raise ConfigError("reporting.run_dir", str(directory.path), remedy)


def _try_out(checkpointing: CheckpointingSettings) -> None:
    # A folder of the run directory is as writable as that.
    if checkpointing.interval > 0 and checkpointing.path is not None:
        Folder.at(checkpointing.path).try_out()


def _store_and_resolved(
    config: AlgorithmConfig, directory: RunDirectory, recorded: Mapping[str, Any]
) -> tuple[CheckpointStore, str]:
    """Where the run keeps checkpoints, and all its settings as YAML; ``recorded`` are those that it had before."""
    before = flatten(recorded).get(_PATH)
    path = _own_path(config.settings.checkpointing.path, run_name=directory.name, recorded=before)
    folder = Folder.at(directory.checkpoints if path is None else path)
    is_own = path is None or folder.name == directory.name
    store = CheckpointStore(folder, run_id=directory.run_id(), is_own=is_own)
    return store, resolved_yaml(config.copy().checkpointing(path=path))


def _own_path(given: str | None, *, run_name: str, recorded: str | None) -> str | None:
    """The run's own folder in ``checkpointing.path``, which several runs may name.

    Args:
        given: The setting; ``None``: the run directory's folder.
        run_name: Name of the run directory.
        recorded: What the run used before: it may have been begun before runs had folders of their own, or been
            renamed since.
    """
    if given is None:
        return None
    folder = Folder.at(given)
    own = folder if folder.name == run_name else folder / run_name
    if recorded is not None and Folder.at(recorded) in (folder, own):
        return Folder.at(recorded).location
    return own.location


def _recorded(directory: RunDirectory) -> Mapping[str, Any]:
    """The settings that the run was begun with.

    Raises:
        ConfigError: There are none: they were not written whole, or the file was taken away.
    """
    try:
        settings = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, Mapping):
        remedy = "its config.yaml holds no settings; copy that of a checkpoint there, or choose another folder"
        raise ConfigError("reporting.run_dir", str(directory.path), remedy)
    return settings
