"""The calls that a training step is made of, and how they are resumed after an interruption."""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from rlhf_ray.algorithm.inputs import Inputs
from rlhf_ray.algorithm.iteration import Iteration, Stage, is_due, iteration_result
from rlhf_ray.algorithm.start import Parts
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan, attention_length, plan_update
from rlhf_ray.learner.remote.commands import UpdateResult
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.rewards.shaping import shaped
from rlhf_ray.rollouts.tally import Collected
from rlhf_ray.span_log import SpanLog
from rlhf_ray.types import ScoredGroup
from rlhf_ray.weight_sync.publisher import SyncResult

__all__ = ["TrainingSteps"]


class TrainingSteps:
    """What :meth:`training_step` calls, in this order: collect, make_batch, update, publish, result.

    Each of them is done once per iteration: called again after an error or Ctrl-C, it returns what it returned, or
    continues where it was (:class:`~rlhf_ray.algorithm.iteration.Iteration`).
    """

    settings: Settings
    iteration: int
    """Iterations that are done; the one that is made is the next."""
    _now: Iteration
    _inputs: Inputs
    _reporters: ReporterSet
    _spans: SpanLog
    _parts: Parts | None
    _step_started: float

    def training_step(self) -> dict[str, Any]:
        """One iteration; returns its result.

        ``train()`` calls it and then begins the next iteration: called again before that, it returns the same result.
        """
        collected = self.collect()
        batch = self.make_batch(collected.groups)
        self.update(batch)
        self.publish()
        return self.result()

    def collect(self) -> Collected:
        """Wait for the next batch of scored groups."""
        self._step_started = time.perf_counter()
        parts = self._running()
        if self._now.collected is not None:
            return self._now.collected
        if self._now.is_loaded:
            self._publish_loaded()
        with self._phase("collect"):
            collected = parts.controller.collect(self._now.version)
        self._show_groups(collected.groups)
        self._now = replace(self._now, collected=collected)
        return collected

    def make_batch(self, groups: tuple[ScoredGroup, ...]) -> SequenceBatch:
        """Lay scored groups out as sequences, with the rewards that the update sees."""
        if self._now.batch is not None:
            return self._now.batch
        max_staleness, mask_truncated = self.settings.rollouts.max_staleness, self.settings.training.mask_truncated
        batch = SequenceBatch.from_groups(
            groups,
            version=self._now.version,
            max_staleness=max_staleness,
            min_success=self.settings.training.nll_min_reward,
        )
        return shaped(batch, self.settings.rewards, mask_truncated=mask_truncated)

    def update(self, batch: SequenceBatch) -> UpdateResult:
        """Train on a batch, and take the new policy from the learners, once per iteration."""
        parts, update = self._running(), self._now.update
        if update is not None and self._now.stage is Stage.DONE:
            return update
        parts.weight_sync.finish_interrupted()
        plan = self._now.plan or self._plan(
            batch
        )  # Before the turn: engines that share the learners' GPUs wait for it.
        with parts.learners.turn():
            update = update or self._updated(parts, batch, plan)
            with self._phase("gather"):
                parts.weight_sync.gather(self._now.version)
        return update

    def publish(self) -> SyncResult:
        """Bring the new policy to every replica; returns the last publication that all acknowledged."""
        if self._now.publication is not None:
            return self._now.publication
        with self._phase("publish"):
            publication = self._running().weight_sync.deliver()
        self._now = replace(self._now, stage=Stage.DONE, publication=publication)
        return publication

    def result(self) -> dict[str, Any]:
        """Report the completions where they are due; returns the result of the iteration."""
        iteration_s, now = time.perf_counter() - self._step_started, self._now
        assert now.collected and now.update, "collect() and update() come first"
        if self._completions_are_due:
            self._reporters.report_completions(self.iteration + 1, now.collected.groups, now.update.estimates)
        self._spans.add(*now.collected.spans)
        weight_sync_s = self._running().weight_sync.blocked_s
        return iteration_result(now, weight_sync_s=weight_sync_s, iteration_s=iteration_s)

    def _updated(self, parts: Parts, batch: SequenceBatch, plan: UpdatePlan) -> UpdateResult:
        version = self._now.version
        self._now = replace(self._now, stage=Stage.UPDATING)
        with self._phase("update"):
            update = parts.learners.update(
                batch,
                plan,
                version=version + 1,
                # Not by version, which runs ahead of the iterations after a rewind.
                update_policy=self.iteration >= self.settings.training.critic_warmup_iterations,
                with_estimates=self._completions_are_due,
            )
        self._now = replace(
            self._now, stage=Stage.PUBLISHING, version=version + 1, batch=batch, plan=plan, update=update
        )
        return update

    def _settled(self) -> Parts:
        """The parts, after what was interrupted: a publication of what was loaded, or a step whose update began."""
        parts = self._running()
        if self._now.is_loaded:
            self._publish_loaded()
        if self._now.is_interrupted:
            self._finished()
        return parts

    def _publish_loaded(self) -> None:
        self._running().weight_sync.publish(self._now.version, overlapping=False)
        self._now = replace(self._now, stage=Stage.COLLECTING)

    def _finished(self) -> dict[str, Any]:
        """The result of the iteration, which is made where it is not there."""
        if self._now.result is not None:
            return self._now.result
        result = self.training_step()
        self._now = replace(self._now, result=result)
        return result

    def _running(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("this algorithm was stopped; build a new one")
        return self._parts

    def _report_timeline(self, number: int) -> None:
        if self.settings.reporting.timeline_interval > 0:
            # In every iteration, or one that is written would have those of several.
            parts = self._running()
            spans = (*self._spans.take(), *parts.rewards.take_spans(), *parts.learners.take_spans())
            if is_due(self.settings.reporting.timeline_interval, number):
                self._reporters.report_spans(number, spans)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._spans.during("algorithm", name)

    @property
    def _completions_are_due(self) -> bool:
        return is_due(self.settings.reporting.completions_interval, self.iteration + 1)

    def _show_groups(self, groups: tuple[ScoredGroup, ...]) -> None:
        if self.settings.callbacks.on_rollout_group is not None:
            for group in groups:
                # A copy: what a callback edits must not change the update.
                self.settings.callbacks.on_rollout_group(algorithm=self, group=copy.deepcopy(group))

    def _plan(self, batch: SequenceBatch) -> UpdatePlan:
        training, learners = self.settings.training, self.settings.learners
        return plan_update(
            batch.lengths.tolist(),
            batch.loss_lengths.tolist(),
            num_minibatches=training.num_minibatches,
            num_epochs=Schedule(self.settings).passes,
            num_ranks=learners.num_learners // learners.sequence_parallel,
            max_tokens=learners.max_tokens_per_microbatch * learners.sequence_parallel,
            attention_length=attention_length(self._inputs.model_config.get_text_config().hidden_size),
            packed=self._running().learners.packed,
            seed=self.settings.debugging.seed * 1_000_003 + self._now.version,
            of_trajectory=batch.of_trajectory.tolist(),
            successful=batch.successful.tolist(),
        )
