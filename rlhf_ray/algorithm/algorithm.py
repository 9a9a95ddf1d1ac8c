"""The loop itself: prompts -> rollouts -> rewards -> advantages -> learner -> weight sync, one call a step.

:meth:`Algorithm.training_step` is the map of the house. Everything else here is what a user calls around it: ``train``,
``evaluate``, ``save_to_path``, ``from_checkpoint``, ``export_hf`` and ``stop``.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from ray.tune import PlacementGroupFactory, Trainable

from rlhf_ray.algorithm.assembly import (
    Inputs,
    Parts,
    check_inputs,
    evaluator,
    learner_spec,
    start_parts,
    training_progress,
)
from rlhf_ray.algorithm.iteration_result import iteration_result
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.algorithm.resuming import RunStart, open_run, open_trial_run
from rlhf_ray.algorithm.run_counts import RunCounts
from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.checkpoints.writer import CheckpointWriter
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import LearnerError
from rlhf_ray.evaluation.evaluator import Outcomes, evaluation_due
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan, attention_length, plan_update
from rlhf_ray.learner.remote.group import StateLostError
from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.rewards.shaping import shaped
from rlhf_ray.rollouts.rollouter import Rollouter, SingleTurn
from rlhf_ray.span_log import SpanLog
from rlhf_ray.stopping import stop_all
from rlhf_ray.tune.storage import folder_to_read, folder_to_write
from rlhf_ray.tune.trial import TRIAL_CPUS, Trial, same_parts
from rlhf_ray.types import Float32Array, ScoredGroup

__all__ = ["Algorithm"]

_LOG = logging.getLogger(__name__)
_LIVE: weakref.WeakSet[Algorithm] = weakref.WeakSet()
# transformers imports its classes when they are first named, which two threads must not do at once.
_CHECKING = threading.Lock()


class Algorithm(Trainable):  # type: ignore[misc]
    """Reinforcement learning of a language model, step by step; also a Ray Tune ``Trainable``.

    Args:
        config: An :class:`AlgorithmConfig`, or a dictionary as Ray Tune passes it.
        storage: Given by Ray Tune.

    Raises:
        ConfigError: A setting is wrong; found before anything is started.
        DataError: The dataset is missing, empty or lacks a column; found before any engine is started.
        RolloutError: A replica cannot start.
        LearnerError: A learner cannot start.
    """

    config_class: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    rollouter: ClassVar[Rollouter] = SingleTurn()
    """The kind of rollout; a subclass names another one."""

    def __init__(self, config: AlgorithmConfig | dict[str, Any] | None = None, storage: Any = None) -> None:
        if isinstance(config, AlgorithmConfig):
            config = config.to_dict()
        self._parts: Parts | None = None
        self._run: RunStart | None = None
        self._newest_evaluation: dict[str, dict[str, Any]] | None = None
        self.policy_version = 0
        self._rewinds = 0
        self._updating = False
        """Whether the learners may be ahead of the rest: an update was begun, and was not published."""
        self._trained: dict[str, Any] | None = None
        """Result of a training step whose iteration has not ended."""
        self._spans = SpanLog()
        super().__init__(config=config, storage=storage)

    def setup(self, config: dict[str, Any]) -> None:
        """Check everything, then start learners, replicas and reward workers side by side."""
        self._use(self._checked(config))
        with _CHECKING:
            inputs = check_inputs(self.settings)
        self._evaluator = evaluator(self.settings, inputs)
        self._first_position = inputs.prompts.state()
        _LIVE.add(self)
        try:
            run = self._open_run()
            self._start(inputs)
            if run.checkpoint is not None:
                self._continue_from(run.checkpoint)
            if run.goes_on:  # Only now: settings that do not start must not take the place of those that did.
                self._reporters.stop()
                run.take_up(self.iteration)
                self._report_again()
        except BaseException:
            self.stop()
            raise

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What Ray Tune reserves for a trial: its own process alone.

        Serve, Ray Train and the reward workers reserve for themselves, outside of the trial's placement group, and a
        trial waits until there is room for all of them.
        """
        return PlacementGroupFactory([{"CPU": TRIAL_CPUS}])

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self._directory.path

    def training_step(self) -> dict[str, Any]:
        """One iteration; returns its result.

        Called again after an error or Ctrl-C, it goes on where it was: flow and learners have what they did.
        """
        started = time.perf_counter()
        parts, version = self._running(), self.policy_version
        if parts.publications.version != version and not self._updating:  # What followed a restore failed.
            parts.publications.publish(version, beside=False)
        with self._phase("collect"):
            collected = parts.controller.collect(version)
        self._show_groups(collected.groups)
        batch = shaped(
            SequenceBatch.from_groups(
                collected.groups, version=version, max_staleness=self.settings.rollouts.max_staleness
            ),
            self.settings.rewards,
            mask_truncated=self.settings.training.mask_truncated,
        )
        plan = self._plan(batch, version)
        # Not by version, which runs ahead of the iterations after a rewind.
        update_policy = self.iteration >= self.settings.training.critic_warmup_iterations
        self._updating = True
        parts.publications.finish_interrupted()
        with parts.learners.turn():
            with self._phase("update"):
                update = parts.learners.update(
                    batch,
                    plan,
                    version=version + 1,
                    update_policy=update_policy,
                    with_advantages=self._completions_are_due,
                )
            with self._phase("gather"):
                parts.publications.gather(version + 1)
        with self._phase("publish"):
            publication = parts.publications.deliver()
        iteration_s = time.perf_counter() - started
        self._report_completions(collected.groups, update.advantages)
        self._spans.add(*collected.spans)
        result = iteration_result(
            collected,
            batch,
            plan,
            update.figures,
            publication,
            policy_version=version + 1,
            weight_sync_s=parts.publications.held_up_s,
            iteration_s=iteration_s,
        )
        self.policy_version, self._updating = version + 1, False
        return result

    def step(self) -> dict[str, Any]:
        """What ``train()`` runs: a training step, and evaluation and checkpoint where they are due."""
        started = time.perf_counter()
        self._go_on_reporting()
        lost: StateLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._rewind(lost)
                self._evaluate_at_start()
                result = self._trained = self._trained or self.training_step()
                number = self.iteration + 1
                evaluation = self._evaluation_of(number)
                break
            except StateLostError as error:
                lost = error
        result["done"] = number >= self.settings.training.iterations
        if evaluation is not None:
            result["evaluation"] = evaluation
        interval = self.settings.checkpointing.interval
        if _due(interval, number) or (interval > 0 and result["done"]):
            with self._phase("copy for a checkpoint"):
                so_far_s = self._time_total + time.perf_counter() - started
                self._save_beside_training(number, result, time_total_s=so_far_s)
        self._tell_of_checkpoints()
        counts = self._counts.totals()
        result["rollouts"]["dropped_prompts"] = counts.pop("dropped_prompts")
        result["fault_tolerance"] = counts
        if self.settings.callbacks.on_train_result is not None:
            self.settings.callbacks.on_train_result(algorithm=self, result=result)
        self._report_timeline(number)
        self._trained = None
        return result

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Measure the current policy on the held-out sets: ``{dataset: {"reward_mean": ...}}``.

        Empty when the run has its own training data and no ``data.eval_path``.
        """
        metrics = self._evaluator.metrics(self._sample_evaluation())
        if metrics and self.settings.callbacks.on_evaluate_end is not None:
            self.settings.callbacks.on_evaluate_end(algorithm=self, metrics=metrics)
        return metrics

    def sample_evaluation(self) -> Outcomes:
        """The held-out completions themselves, set after set, each in its own order."""
        return tuple(outcome for of_set in self._sample_evaluation().values() for outcome in of_set)

    def save_to_path(self, path: str | os.PathLike[str]) -> str:
        """Write a checkpoint folder: policy, critic, optimizers, prompt position and counters.

        Args:
            path: A folder, or a URI that pyarrow knows, such as ``s3://bucket/checkpoint``.

        Returns:
            The folder, absolute, or the URI.
        """
        self._finish_update()
        checkpoint = Checkpoint(Folder.at(path))
        iterations = self.iteration + (self._trained is not None)
        state = self._state(iterations, self._time_total, score=None)
        self._writer.write(checkpoint, config=self._opened().resolved, state=state)
        self._call_on_checkpoint(checkpoint)
        return checkpoint.folder.location

    def restore_from_path(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint folder or URI, on any number of learners and replicas.

        Raises:
            DataError: It holds no complete checkpoint.
        """
        checkpoint = Checkpoint(Folder.at(path))
        checkpoint.read()
        self._continue_from(checkpoint)

    def _continue_from(self, checkpoint: Checkpoint, version: int | None = None) -> None:
        """Take everything from a checked checkpoint, and call its policy ``version`` where that is given."""
        parts, state = self._running(), checkpoint.state()
        self._updating, self._trained = False, None
        if version is None:
            self._counts.go_on_from(state.counts)
        version = state.policy_version if version is None else version
        self._writer.settle()
        parts.publications.settle()
        # First: what is in flight would go on asking for the version that it was admitted at.
        parts.controller.resume(version)
        parts.learners.load(checkpoint.learner, version)
        self._inputs.prompts.restore(state.prompt_position)
        self.policy_version = version
        if version > 0 or parts.publications.version != 0:
            parts.publications.publish(version, beside=False)
        self._iteration = state.iteration
        self._time_total = state.time_total_s
        self._newest_evaluation = None

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], config: AlgorithmConfig | None = None) -> Algorithm:
        """Build an algorithm from a checkpoint folder, in a new run directory.

        ``Algorithm.from_checkpoint`` builds the one that wrote it, ``GRPO.from_checkpoint`` refuses all but GRPO's.

        Args:
            path: What ``save_to_path`` wrote.
            config: Settings to use instead of the checkpoint's own; needed where those hold a closure.

        Raises:
            ConfigError: It is another algorithm's.
            DataError: It holds no complete checkpoint.
        """
        checkpoint = Checkpoint(Folder.at(path))
        checkpoint.read()
        if config is None:
            config = cls.config_class.from_yaml(checkpoint.config())
        algorithm = (config.algorithm_class if cls is Algorithm else cls)(config=config)
        try:
            algorithm._continue_from(checkpoint)
        except BaseException:
            algorithm.stop()
            raise
        return algorithm

    def export_hf(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy, and the critic under ``critic/``, as folders that transformers and vLLM load."""
        from rlhf_ray.algorithm.exported_folder import complete_export

        self._finish_update()
        folder = Path(path).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._running().learners.export(str(folder))
        complete_export(folder, self.settings, self._inputs)
        return folder

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Tune's way to :meth:`save_to_path`."""
        with folder_to_write(checkpoint_dir, self._storage) as folder:
            self.save_to_path(folder.location)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Ray Tune's way to :meth:`restore_from_path`."""
        with folder_to_read(checkpoint, self._storage) as folder:
            self.restore_from_path(folder.location)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, or the same one with other settings: Ray Tune's ``reuse_actors=True``.

        Where only numbers of the training section differ, all processes go on, which saves most of the start of a
        trial; else everything is started again.
        """
        before, config = self.settings, self._checked(new_config)
        if self._parts is None or not same_parts(before, config.settings):
            self.cleanup()
            self.setup(new_config)
            return True
        try:
            self._reporters.stop()
            self._use(config)
            self._open_run()
            self._begin_again()
        except BaseException:
            self.cleanup()
            raise
        return True

    def log_result(self, result: dict[str, Any]) -> None:
        """Hand the finished result to the reporters; called by ``train()``."""
        self._reporters.report(result)

    def cleanup(self) -> None:
        """Stop every process, actor, Serve app and placement group of this run; called by ``stop()``.

        What cannot be stopped is logged, and raises nothing: it would take the place of the error that ended the run.
        """
        _LIVE.discard(self)
        parts, self._parts = self._parts, None
        steps: list[tuple[str, Callable[[], object]]] = []
        if parts is not None:
            steps += [("checkpoint", self._finish_checkpoints), ("parts", parts.stop)]
        elif hasattr(self, "_session"):
            steps.append(("Ray", self._session.stop))
        steps.append(("reporters", self._reporters.stop))
        if self._run is not None:
            steps.append(("lock of the run directory", self._run.lock.release))
        stop_all(*steps)

    def _finish_checkpoints(self) -> None:
        self._writer.stop()
        self._tell_of_checkpoints()

    def stop(self) -> None:
        """Leave nothing behind; may be called again, and before set-up has finished."""
        if hasattr(self, "_monitor"):
            super().stop()
        else:
            self.cleanup()

    def _setup_logdir(self) -> None:
        # Outside Tune the run directory is made in set-up; Ray's default would leave a folder in the user's home.
        # In Tune it would also change the working directory, and relative paths would no longer be the user's.
        if self._storage:
            os.environ.setdefault("TUNE_ORIG_WORKING_DIR", os.getcwd())
            self._logdir = self._storage.trial_working_directory
            os.makedirs(self._logdir, exist_ok=True)

    def _checked(self, config: dict[str, Any]) -> AlgorithmConfig:
        self._trial = Trial.of(self)
        given = self.config_class.from_dict(config)
        return (given if self._trial is None else self._trial.adapted(given)).validate().freeze()

    def _use(self, config: AlgorithmConfig) -> None:
        self.algorithm_config = config
        self.settings: Settings = config.settings
        logging.getLogger("rlhf_ray").setLevel(self.settings.debugging.log_level)
        self._reporters = ReporterSet.from_settings(self.settings)
        self.policy_version = 0
        self._updating, self._trained = False, None
        self._evaluated_at_start = False
        self._newest_evaluation = None

    def _begin_again(self) -> None:
        """With the same processes: policy, critic, optimizers and prompts as after a start."""
        parts = self._running()
        self._evaluator = evaluator(self.settings, self._inputs)
        self._writer.settle()
        parts.publications.settle()
        parts.controller.resume(0)
        self._counts.go_on_from({})
        parts.learners.renew(learner_spec(self.settings, self._inputs, parts.session))
        self._inputs.prompts.restore(self._first_position)
        parts.rewards.progress = training_progress(self.settings, self._inputs)
        parts.publications.publish(0, beside=False)

    def _open_run(self) -> RunStart:
        open_directory = open_run if self._trial is None else open_trial_run
        if self._run is not None:  # That of the trial before, or of the same one.
            self._run.lock.release()
        run = open_directory(self.algorithm_config, algorithm=self.algorithm_config.algorithm_name.lower())
        self._run, self._directory, self._store = run, run.directory, run.store
        if self._trial is None:
            self._logdir = str(run.directory.path)
        self._reports = not run.has_history
        if self._reports:
            self._reporters.start(self.settings, self._directory)
        return run

    def _go_on_reporting(self) -> None:
        """In a trial that Tune started anew: only now is it known from which iteration it goes on."""
        if not self._reports:
            self._reports = True
            self._opened().take_up(self.iteration)
            self._reporters.start(self.settings, self._directory)

    def _report_again(self) -> None:
        """With new reporters: the files of those before have changed."""
        self._reporters = ReporterSet.from_settings(self.settings)
        self._reporters.start(self.settings, self._directory)

    def _opened(self) -> RunStart:
        assert self._run is not None, "the run directory is opened in set-up"
        return self._run

    def _start(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._reporters.phase("starting Ray")
        self._session = RaySession(self.settings, self._trial)
        self._parts = start_parts(
            self.settings, inputs, self._directory, self._reporters, self._session, self.rollouter
        )
        self._writer = CheckpointWriter(self._parts.learners)
        self._counts = RunCounts(self._counted_here)
        self._reporters.phase("ready")

    def _running(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("this algorithm was stopped; build a new one")
        return self._parts

    def _finish_update(self) -> None:
        """Finish the training step that was interrupted in the middle of its update, if one was."""
        self._running()
        if self._updating:
            self._trained = self.training_step()

    def _show_groups(self, groups: tuple[ScoredGroup, ...]) -> None:
        if self.settings.callbacks.on_rollout_group is not None:
            for group in groups:
                # A copy: what a callback edits must not change the update.
                self.settings.callbacks.on_rollout_group(algorithm=self, group=copy.deepcopy(group))

    def _plan(self, batch: SequenceBatch, version: int) -> UpdatePlan:
        training, learners = self.settings.training, self.settings.learners
        return plan_update(
            batch.lengths.tolist(),
            batch.loss_lengths.tolist(),
            num_minibatches=training.num_minibatches,
            num_epochs=training.num_epochs,
            num_ranks=learners.num_learners // learners.sequence_parallel,
            max_tokens=learners.max_tokens_per_microbatch * learners.sequence_parallel,
            attention_length=attention_length(self._inputs.model_config.get_text_config().hidden_size),
            packed=self._running().learners.packed,
            seed=self.settings.debugging.seed * 1_000_003 + version,
        )

    def _sample_evaluation(self) -> dict[str, Outcomes]:
        self._finish_update()
        return self._evaluator.sample(self._running().controller, self.policy_version)

    def _evaluation_of(self, number: int) -> dict[str, dict[str, Any]] | None:
        """What the result of an iteration says of the held-out sets, if anything.

        Ray Tune stops a sweep whose metric is missing in one result: a trial is evaluated in its first iteration too
        and repeats the newest evaluation until the next.
        """
        evaluation = self.settings.evaluation
        is_first_of_trial = self._trial is not None and self._newest_evaluation is None
        if evaluation_due(self.settings, number) or (is_first_of_trial and (evaluation.interval or evaluation.at_end)):
            with self._phase("evaluate"):
                self._newest_evaluation = self.evaluate()
            return self._newest_evaluation
        return None if self._trial is None else self._newest_evaluation

    def _evaluate_at_start(self) -> None:
        # Once, also where the first iteration fails and is asked for again.
        if self.iteration == 0 and not self._evaluated_at_start and evaluation_due(self.settings, 0):
            self._reporters.phase("evaluating")
            result = {"training_iteration": 0, "timestamp": int(time.time()), "evaluation": self.evaluate()}
            self._evaluated_at_start = True
            self._reporters.report(result)

    @property
    def _completions_are_due(self) -> bool:
        return _due(self.settings.reporting.completions_interval, self.iteration + 1)

    def _report_completions(self, groups: tuple[ScoredGroup, ...], advantages: tuple[Float32Array, ...] | None) -> None:
        if self._completions_are_due:
            self._reporters.report_completions(self.iteration + 1, groups, advantages)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._spans.during("algorithm", name)

    def _report_timeline(self, number: int) -> None:
        if self.settings.reporting.timeline_interval > 0:
            # In every iteration, or one that is written would have those of several.
            parts = self._running()
            spans = (*self._spans.take(), *parts.rewards.take_spans(), *parts.learners.take_spans())
            if _due(self.settings.reporting.timeline_interval, number):
                self._reporters.report_spans(number, spans)

    def _save_beside_training(self, number: int, result: dict[str, Any], *, time_total_s: float) -> None:
        settings = self.settings.checkpointing
        score = None if settings.best_metric is None else flatten(result).get(settings.best_metric)
        self._writer.begin(
            self._store.of_iteration(number),
            config=self._opened().resolved,
            state=self._state(number, time_total_s, score=_finite(score)),
            then=lambda: self._store.prune(
                keep=settings.keep,
                keep_best=settings.keep_best,
                highest_is_best=settings.best_mode == "max",
                metric=settings.best_metric,
            ),
        )

    def _state(self, iteration: int, time_total_s: float, *, score: float | None) -> CheckpointState:
        return CheckpointState(
            policy_version=self.policy_version,
            iteration=iteration,
            time_total_s=time_total_s,
            prompt_position=self._running().controller.prompt_position(self._inputs.prompts, self.policy_version),
            run_id=self._store.run_id,
            metric=self.settings.checkpointing.best_metric if score is not None else None,
            score=score,
            counts=self._counts.totals(),
        )

    def _rewind(self, error: StateLostError) -> None:
        """Go back to the newest checkpoint, all but the policy's version: replicas have seen the next ones already."""
        self._writer.settle()  # It may be writing the newest, and delete what was the newest before.
        checkpoint = self._store.newest()
        if checkpoint is None:
            raise LearnerError(f"{error}, and there is no checkpoint to go back to (checkpointing.interval)") from error
        _LOG.warning("%s; the run goes back to %s", error, checkpoint.folder)
        self._reporters.stop()
        self._directory.forget_after(checkpoint.state().iteration)
        self._report_again()
        newest = self.policy_version + self._updating  # The newest that a replica can have.
        self._continue_from(checkpoint, version=newest + 1)
        self._rewinds += 1

    def _counted_here(self) -> dict[str, int]:
        parts = self._running()
        return {
            "dropped_prompts": self._inputs.prompts.dropped,
            "group_retries": parts.controller.retries,
            "reward_workers_replaced": parts.rewards.workers_replaced,
            "replica_restarts": parts.publications.new_replicas,
            "learner_restarts": parts.learners.restarts,
            "rewinds": self._rewinds,
            "failed_checkpoints": self._writer.failed,
        }

    def _tell_of_checkpoints(self) -> None:
        for checkpoint in self._writer.take_written():
            self._call_on_checkpoint(checkpoint)

    def _call_on_checkpoint(self, checkpoint: Checkpoint) -> None:
        if self.settings.callbacks.on_checkpoint is not None:
            self.settings.callbacks.on_checkpoint(algorithm=self, path=checkpoint.folder.location)


def _finite(score: object) -> float | None:
    """A score that can be compared with others: NaN would be the best for ever."""
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None


def _due(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0


@atexit.register
def _stop_all() -> None:
    """A script may end without ``stop()``, also by Ctrl-C; this runs before Ray's own exit handler."""
    stop_all(*((type(algorithm).__name__, algorithm.stop) for algorithm in list(_LIVE)))
