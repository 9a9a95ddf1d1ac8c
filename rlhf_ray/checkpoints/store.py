"""The checkpoints of one run, newest and best."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.errors import DataError

__all__ = ["CheckpointStore"]

_LOG = logging.getLogger(__name__)
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
