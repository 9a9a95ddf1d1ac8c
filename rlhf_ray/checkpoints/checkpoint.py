"""A checkpoint folder: what it holds, how it is written so that a torn write is never taken for one, and pruning.

::

    <folder>/config.yaml        settings of the run
    <folder>/learner/           distributed checkpoint of policy, critic and optimisers
    <folder>/state.json         counters and prompt position; written last, so its presence says "complete"
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.order import PromptPosition

__all__ = ["Checkpoint", "CheckpointState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """What the Algorithm itself must remember."""

    policy_version: int
    iteration: int
    prompt_position: PromptPosition


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Paths of one checkpoint folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The run's settings."""
        return self.path / "config.yaml"

    @property
    def learner(self) -> Path:
        """The distributed checkpoint."""
        return self.path / "learner"

    @property
    def state(self) -> Path:
        """Counters and prompt position."""
        return self.path / "state.json"

    def begin(self) -> None:
        """Make the folder; an earlier checkpoint there stops counting as one."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.learner, ignore_errors=True)

    def commit(self, *, config: str, policy_version: int, iteration: int, prompt_position: PromptPosition) -> None:
        """Write the rest; the folder is a checkpoint from here on."""
        self.config.write_text(config)
        state = CheckpointState(policy_version=policy_version, iteration=iteration, prompt_position=prompt_position)
        partial = self.state.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(state), indent=2))
        os.replace(partial, self.state)

    def read(self) -> CheckpointState:
        """Read the state.

        Raises:
            DataError: There is no complete checkpoint in the folder.
        """
        try:
            raw = json.loads(self.state.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{self.path} holds no complete checkpoint: {self.state.name}, which is written last, is missing"
            ) from None
        position = PromptPosition(**raw["prompt_position"])
        return CheckpointState(
            policy_version=raw["policy_version"], iteration=raw["iteration"], prompt_position=position
        )

    @staticmethod
    def prune(folder: Path, *, keep: int) -> None:
        """Delete all but the ``keep`` newest complete checkpoints of a run's checkpoint folder."""
        complete = sorted(state.parent for state in folder.glob("*/state.json"))
        for old in complete[:-keep]:
            shutil.rmtree(old)
