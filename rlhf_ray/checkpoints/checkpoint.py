"""A checkpoint folder: what it holds, and how it is written so that a torn write is never taken for one.

::

    <folder>/config.yaml        settings of the run
    <folder>/learner/           policy, critic and optimizers: tensors in safetensors files, one or more per rank
    <folder>/manifest.json      counters, prompt position, and size and checksum of every other file; written last

Nothing in it is executed when it is read: text, JSON and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.errors import DataError
from rlhf_ray.types import PromptPosition

__all__ = ["Checkpoint", "CheckpointState"]

_MANIFEST, _CONFIG, _LEARNER = "manifest.json", "config.yaml", "learner"
_FORMAT = 1


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
