"""A checkpoint folder: what it holds, and how it is written so that a torn write is never taken for one.

::

    <folder>/config.yaml        settings of the run
    <folder>/learner/           policy, critic and optimizers: tensors in safetensors files, one or more per rank
    <folder>/manifest.json      counters, prompt position, and size and checksum of every other file; written last

Nothing in it is executed when it is read: text, JSON and safetensors.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import DataError
from rlhf_ray.types import PromptPosition

__all__ = ["Checkpoint", "CheckpointState", "CheckpointStore"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """What the Algorithm itself must remember."""

    policy_version: int
    iteration: int
    time_total_s: float
    """Seconds of all iterations so far."""
    prompt_position: PromptPosition
    run_id: str | None = None
    """The run that wrote it; unset: it is from before runs had ids."""
    metric: str | None = None
    """Which metric the score is: ``checkpointing.best_metric``; unset: no score, or one from before this was kept."""
    score: float | None = None
    """That metric when it was written; unset: there was no such metric, or it was not a finite number."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was counted since the run began: dropped prompts, and faults that it survived."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint folder."""

    folder: Folder

    @property
    def learner(self) -> Folder:
        """Folder of the learners' files."""
        return self.folder / _LEARNER

    def begin(self) -> None:
        """Make the folder; an earlier checkpoint there stops counting as one."""
        self.folder.delete_file(_MANIFEST)
        self.learner.delete()
        self.learner.make()

    def commit(self, *, config: str, state: CheckpointState, learner_files: Mapping[str, StoredFile]) -> None:
        """Write the rest; the folder is a checkpoint from here on.

        Raises:
            DataError: A learner's file is not there: its node writes to a disk that this one does not see.
        """
        self.folder.write(_CONFIG, config.encode())
        files = {f"{_LEARNER}/{name}": stored for name, stored in learner_files.items()}
        files[_CONFIG] = StoredFile.of_bytes(config.encode())
        self._check(files, "a learner on another node wrote to a disk of its own? Name a shared folder, or s3://")
        manifest = {"format": _FORMAT, **asdict(state), "files": {name: asdict(files[name]) for name in sorted(files)}}
        self.folder.write(_MANIFEST, json.dumps(manifest, indent=2).encode())

    def read(self) -> CheckpointState:
        """Check every file and read the state.

        Raises:
            DataError: The folder holds no complete checkpoint.
        """
        state, files = self._manifest()
        self._check(files, "copy it again, or use an earlier one")
        return state

    def state(self) -> CheckpointState:
        """Read the state and check no other file.

        Raises:
            DataError: There is no whole manifest.
        """
        return self._manifest()[0]

    def is_committed(self) -> bool:
        """Whether there is a manifest, which is written last; it may still not fit the files."""
        return _MANIFEST in self.folder.files()

    def delete(self) -> None:
        """Delete the folder, the manifest first: a delete that is cut short leaves no checkpoint."""
        self.folder.delete_file(_MANIFEST)
        self.folder.delete()

    def config(self) -> str:
        """The run's settings, as YAML.

        Raises:
            DataError: There are none.
        """
        try:
            return self.folder.read(_CONFIG).decode()
        except OSError as error:
            raise self._refusal(f"{_CONFIG} cannot be read") from error

    def _manifest(self) -> tuple[CheckpointState, dict[str, StoredFile]]:
        try:
            manifest = json.loads(self.folder.read(_MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            remedy = "name a folder that save_to_path() wrote, or one of a run's checkpoints/"
            raise self._refusal(f"{_MANIFEST}, which is written last, is missing; {remedy}") from None
        except ValueError:
            raise self._refusal(f"{_MANIFEST} is cut short or is not JSON") from None
        if not isinstance(manifest, dict) or manifest.pop("format", None) != _FORMAT:
            raise self._refusal(f"{_MANIFEST} is not of format {_FORMAT}")
        try:
            files = {name: StoredFile(**stored) for name, stored in manifest.pop("files").items()}
            position = manifest.pop("prompt_position")
            position["unfinished"] = tuple(position["unfinished"])
            return CheckpointState(prompt_position=PromptPosition(**position), **manifest), files
        except (KeyError, TypeError, AttributeError) as error:
            raise self._refusal(f"{_MANIFEST} is not of format {_FORMAT}: {error}") from error

    def _check(self, files: Mapping[str, StoredFile], remedy: str) -> None:
        for name, stored in files.items():
            if not self.folder.holds(name, stored):
                raise self._refusal(f"{name} is missing, cut short or altered; {remedy}")

    def _refusal(self, reason: str) -> DataError:
        return DataError(f"{self.folder} holds no complete checkpoint: {reason}")


# What the run itself names so; a folder of any other name is the user's, also where it holds a checkpoint.
_NAME = re.compile(r"iteration_\d+")


_Found = tuple[Checkpoint, CheckpointState]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of a run, one folder each: ``iteration_000020``."""

    folder: Folder
    run_id: str | None = None
    """Checkpoints of this run count, and those from before runs had ids; unset: all of them."""
    is_own: bool = True
    """Whether no other run writes here: only then it is known whose the folders without a manifest are."""

    def of_iteration(self, iteration: int) -> Checkpoint:
        """The place of the checkpoint of an iteration."""
        return Checkpoint(self.folder / f"iteration_{iteration:06d}")

    def is_taken(self) -> bool:
        """Whether any run has a checkpoint here."""
        return any(checkpoint.is_committed() for checkpoint in self._all())

    def newest(self) -> Checkpoint | None:
        """The newest complete one; those that are not complete are named in the log."""
        for checkpoint, _ in reversed(self._committed(level=logging.WARNING)):
            try:
                checkpoint.read()
            except DataError as error:
                _LOG.warning("%s; looking for an earlier one", error)
            else:
                return checkpoint
        return None

    def prune(self, *, keep: int, keep_best: int, highest_is_best: bool, metric: str | None = None) -> None:
        """Delete all but the ``keep`` newest complete checkpoints and the ``keep_best`` of best score.

        What was begun and never finished goes too, so nothing may be being written here meanwhile.

        Args:
            keep: How many of the newest stay.
            keep_best: How many of the best stay.
            highest_is_best: Whether the highest score is the best.
            metric: ``checkpointing.best_metric``; scores of another one are not compared with it.
        """
        found = self._committed(level=logging.DEBUG)
        kept = [checkpoint for checkpoint, _ in found[-keep:]]
        # Where the name of the metric was not kept it may be this one or another: those compete among themselves.
        for name in {metric, None}:
            of_metric = [(one, state) for one, state in found if state.metric == name]
            kept += _best(of_metric, keep_best, highest_is_best=highest_is_best)
        removed = [checkpoint for checkpoint, _ in found if checkpoint not in kept]
        if self.is_own:
            # A manifest that cannot be read may be one of a later version of this library.
            removed += [checkpoint for checkpoint in self._all() if not checkpoint.is_committed()]
        for checkpoint in removed:
            checkpoint.delete()

    def _committed(self, *, level: int) -> list[_Found]:
        """This run's, by iteration; those without a whole manifest are logged."""
        found = []
        for checkpoint in self._all():
            try:
                state = checkpoint.state()
            except DataError as error:
                _LOG.log(level, "%s; it is skipped", error)
                continue
            if self.run_id is None or state.run_id in (self.run_id, None):
                found.append((checkpoint, state))
        return sorted(found, key=lambda one: one[1].iteration)

    def _all(self) -> list[Checkpoint]:
        return [Checkpoint(folder) for folder in self.folder.folders() if _NAME.fullmatch(folder.name)]


def _best(found: Sequence[_Found], keep: int, *, highest_is_best: bool) -> list[Checkpoint]:
    """Those of best score, the later one of two equals."""
    sign = 1.0 if highest_is_best else -1.0
    scored = [
        (sign * state.score, state.iteration, checkpoint)
        for checkpoint, state in found
        if state.score is not None and math.isfinite(state.score)
    ]
    scored.sort(key=lambda one: one[:2], reverse=True)
    return [checkpoint for _, _, checkpoint in scored[:keep]]


_MANIFEST, _CONFIG, _LEARNER = "manifest.json", "config.yaml", "learner"

_FORMAT = 1
