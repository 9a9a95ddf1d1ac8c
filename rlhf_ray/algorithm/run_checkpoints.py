"""The checkpoints of a run: when they are written, which are kept, and the counts that they carry from run to run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf_ray.algorithm.iteration import is_due
from rlhf_ray.algorithm.resuming import RunStart
from rlhf_ray.algorithm.start import Parts
from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.writer import CheckpointWriter
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import LearnerError
from rlhf_ray.reporting.metrics import flatten

__all__ = ["RunCheckpoints"]

_LOG = logging.getLogger(__name__)


class RunCheckpoints:
    """Writes checkpoints, in the background where training continues.

    Args:
        settings: The run's settings.
        run: Where the run keeps them.
        parts: What is saved, and what counts.
    """

    def __init__(self, settings: Settings, run: RunStart, parts: Parts) -> None:
        self._settings = settings
        self._run = run
        self._parts = parts
        self._writer = CheckpointWriter(parts.learners)
        self._counted_before: dict[str, int] = {}
        self.rewinds = 0
        """How often this process went back to a checkpoint."""

    def renew(self, settings: Settings, run: RunStart) -> None:
        """Begin those of another run with the same parts."""
        self.wait_pending()
        self._settings, self._run = settings, run
        self.count_from({})

    def is_due(self, number: int, *, is_last: bool) -> bool:
        """Whether an iteration ends with a checkpoint."""
        interval = self._settings.checkpointing.interval
        return is_due(interval, number) or (interval > 0 and is_last)

    def begin(self, state: CheckpointState, result: Mapping[str, Any]) -> None:
        """Write the checkpoint of an iteration in the background, and delete those that are not kept."""
        settings, store = self._settings.checkpointing, self._run.store
        if settings.best_metric is not None:
            score = _finite(flatten(result).get(settings.best_metric))
            state = replace(state, score=score, metric=None if score is None else settings.best_metric)
        self._writer.begin(
            store.of_iteration(state.iteration),
            config=self._run.resolved,
            state=state,
            then=lambda: store.prune(
                keep=settings.keep,
                keep_best=settings.keep_best,
                highest_is_best=settings.best_mode == "max",
                metric=settings.best_metric,
            ),
        )

    def write(self, checkpoint: Checkpoint, state: CheckpointState, algorithm: Any) -> None:
        """Write a checkpoint and wait for it."""
        self._writer.write(checkpoint, config=self._run.resolved, state=state)
        self._call(checkpoint, algorithm)

    def state(self, version: int, iteration: int, time_total_s: float) -> CheckpointState:
        """Where the run is, which a checkpoint holds next to its models."""
        return CheckpointState(
            policy_version=version,
            iteration=iteration,
            time_total_s=time_total_s,
            prompt_position=self._parts.controller.prompt_position(version),
            run_id=self._run.store.run_id,
            counts=self.counts(),
        )

    def counts(self) -> dict[str, int]:
        """What was counted since the run began, by this process and by those before it was resumed."""
        return {name: self._counted_before.get(name, 0) + count for name, count in self._counted_here().items()}

    def count_from(self, totals: Mapping[str, int]) -> None:
        """Continue a run that had counted ``totals``; what this process has counted so far is not the run's."""
        self._counted_before = {name: totals.get(name, 0) - count for name, count in self._counted_here().items()}

    def tell(self, algorithm: Any) -> None:
        """Call ``on_checkpoint`` for those that have been written since the last time."""
        for checkpoint in self._writer.take_written():
            self._call(checkpoint, algorithm)

    def wait_pending(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._writer.wait_pending()

    def stop(self, algorithm: Any) -> None:
        """Wait for the checkpoint that is being written, and end the writer."""
        self._writer.stop()
        self.tell(algorithm)

    def to_rewind_to(self, error: LearnerError) -> Checkpoint:
        """The newest complete checkpoint.

        Raises:
            LearnerError: There is none.
        """
        self.wait_pending()  # It may be writing the newest, and delete what was the newest before.
        checkpoint = self._run.store.newest()
        if checkpoint is None:
            raise LearnerError(f"{error}, and there is no checkpoint to go back to (checkpointing.interval)") from error
        _LOG.warning("%s; the run goes back to %s", error, checkpoint.folder)
        return checkpoint

    def _call(self, checkpoint: Checkpoint, algorithm: Any) -> None:
        if self._settings.callbacks.on_checkpoint is not None:
            self._settings.callbacks.on_checkpoint(algorithm=algorithm, path=checkpoint.folder.location)

    def _counted_here(self) -> dict[str, int]:
        parts = self._parts
        return {
            "dropped_prompts": parts.prompts.dropped,
            "group_retries": parts.controller.retries,
            "reward_workers_replaced": parts.rewards.workers_replaced,
            "replica_restarts": parts.weight_sync.new_replicas,
            "learner_restarts": parts.learners.restarts,
            "rewinds": self.rewinds,
            "failed_checkpoints": self._writer.failed,
        }


def _finite(score: object) -> float | None:
    """A score that can be compared with others: NaN would always be the best."""
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None
