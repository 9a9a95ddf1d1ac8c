"""The loop itself: prompts -> rollouts -> rewards -> advantages -> learner -> weight sync, one call per step.

:meth:`Algorithm.training_step` is the overview. Everything else here is what a user calls around it: ``train``,
``evaluate``, ``save_to_path``, ``from_checkpoint``, ``export_hf`` and ``stop``.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ray.tune import Trainable

from rlhf_ray.algorithm.inputs import Inputs, check_inputs
from rlhf_ray.algorithm.iteration import Iteration
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.algorithm.resuming import RunStart, open_run
from rlhf_ray.algorithm.run_checkpoints import RunCheckpoints
from rlhf_ray.algorithm.run_plan import RunPlan
from rlhf_ray.algorithm.start import Parts, start_parts
from rlhf_ray.algorithm.training_steps import TrainingSteps
from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.evaluation.evaluator import Evaluator, Outcomes, evaluation_due
from rlhf_ray.learner.remote.group import StateLostError
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.rollouts.rollouter import Rollouter, SingleTurn
from rlhf_ray.span_log import SpanLog
from rlhf_ray.stopping import stop_all

__all__ = ["Algorithm"]

_LIVE: weakref.WeakSet[Algorithm] = weakref.WeakSet()
# transformers imports its classes when they are first named, which two threads must not do at once.
_CHECKING = threading.Lock()


class Algorithm(TrainingSteps, Trainable):  # type: ignore[misc]
    """Reinforcement learning of a language model, step by step.

    A subclass may name another :attr:`rollouter`, or write a :meth:`training_step` of its own from the same calls:
    :meth:`collect`, :meth:`make_batch`, :meth:`update`, :meth:`publish` and :meth:`result`.

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
    """The kind of rollout."""
    _run: RunStart
    _session: RaySession

    def __init__(self, config: AlgorithmConfig | dict[str, Any] | None = None, storage: Any = None) -> None:
        if isinstance(config, AlgorithmConfig):
            config = config.to_dict()
        self._parts: Parts | None = None
        self._now = Iteration()
        self._step_started = 0.0
        self._spans = SpanLog()
        super().__init__(config=config, storage=storage)

    def setup(self, config: dict[str, Any]) -> None:
        """Check everything, then start learners, replicas and reward workers at the same time."""
        self._use(self._checked(config))
        with _CHECKING:
            inputs = check_inputs(self.settings)
        self._evaluator = Evaluator(self.settings, inputs.held_out)
        self._first_position = inputs.prompts.state()
        _LIVE.add(self)
        try:
            run = self._open_run()
            self._start(inputs)
            if run.checkpoint is not None:
                self._resume(run.checkpoint)
            if run.resumes:  # Only now: settings that do not start must not take the place of those that did.
                self._reporters.stop()
                run.adopt_run(self.iteration)
                self._report_again()
        except BaseException:
            self.stop()
            raise

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self._run.directory.path

    @property
    def policy_version(self) -> int:
        """The policy's version: updates applied since the run began, and one more for each rewind."""
        return self._now.version

    def step(self) -> dict[str, Any]:
        """What ``train()`` runs: a training step, and evaluation and checkpoint where they are due."""
        started = time.perf_counter()
        result, evaluation = self._step_and_evaluation()
        number = self.iteration + 1
        result["done"] = number >= self.settings.training.iterations
        if evaluation is not None:
            result["evaluation"] = evaluation
        if self._checkpoints.is_due(number, is_last=result["done"]):
            with self._phase("copy for a checkpoint"):
                time_total_s = self._time_total + time.perf_counter() - started
                self._checkpoints.begin(self._checkpoints.state(self._now.version, number, time_total_s), result)
        self._checkpoints.tell(self)
        counts = self._checkpoints.counts()
        result["rollouts"]["dropped_prompts"] = counts.pop("dropped_prompts")
        result["fault_tolerance"] = counts
        if self.settings.callbacks.on_train_result is not None:
            self.settings.callbacks.on_train_result(algorithm=self, result=result)
        self._report_timeline(number)
        self._now = Iteration(version=self._now.version)
        return result

    def _step_and_evaluation(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]] | None]:
        """A training step, or the result that is there, and its evaluation; rewinds where learners lost their state."""
        lost: StateLostError | None = None
        while True:
            try:
                if lost is not None:
                    self._rewind(lost)
                self._evaluate_at_start()
                return self._finished(), self._evaluation_of(self.iteration + 1)
            except StateLostError as error:
                lost = error

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
        self._settled()
        iterations = self.iteration + (self._now.result is not None)
        checkpoint = Checkpoint(Folder.at(path))
        state = self._checkpoints.state(self._now.version, iterations, self._time_total)
        self._checkpoints.write(checkpoint, state, self)
        return checkpoint.folder.location

    def restore_from_path(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint folder or URI, on any number of learners and replicas.

        Raises:
            DataError: It holds no complete checkpoint.
        """
        checkpoint = Checkpoint(Folder.at(path))
        checkpoint.read()
        self._resume(checkpoint)

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
        algorithm = (config.algorithm_class if cls.config_class is AlgorithmConfig else cls)(config=config)
        try:
            algorithm._resume(checkpoint)
        except BaseException:
            algorithm.stop()
            raise
        return algorithm

    def export_hf(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy, and the critic under ``critic/``, as folders that transformers and vLLM load."""
        from rlhf_ray.algorithm.exported_folder import complete_export

        parts, folder = self._settled(), Path(path).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        parts.learners.export(str(folder))
        complete_export(folder, self.settings, self._inputs)
        return folder

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
            steps += [("checkpoint", lambda: self._checkpoints.stop(self)), ("parts", parts.stop)]
        elif hasattr(self, "_session"):
            steps.append(("Ray", self._session.stop))
        steps.append(("reporters", self._reporters.stop))
        if hasattr(self, "_run"):
            steps.append(("lock of the run directory", self._run.lock.release))
        stop_all(*steps)

    def stop(self) -> None:
        """Leave nothing behind; may be called again, and before set-up has finished."""
        if hasattr(self, "_monitor"):
            super().stop()
        else:
            self.cleanup()

    # Set-up; a Ray Tune trial (tune/trial_algorithm.py) does some of it in another way.

    def _setup_logdir(self) -> None:
        """Make no folder: Ray's default lies in the user's home, and the run directory is made in set-up."""

    def _checked(self, config: dict[str, Any]) -> AlgorithmConfig:
        return self.config_class.from_dict(config).validate().freeze()

    def _use(self, config: AlgorithmConfig) -> None:
        self.algorithm_config = config
        self.settings: Settings = config.settings
        logging.getLogger("rlhf_ray").setLevel(self.settings.debugging.log_level)
        self._reporters = ReporterSet.from_settings(self.settings)
        self._now = Iteration()
        self._evaluated_at_start = False

    def _open_run(self) -> RunStart:
        run = self._run = open_run(self.algorithm_config)
        self._logdir = str(run.directory.path)
        self._reporters.start(self.settings, run.directory)
        return run

    def _start(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._reporters.phase("starting Ray")
        self._session = session = self._join_ray()
        plan = RunPlan.of(self.settings, inputs, session.placement)
        say, directory = self._reporters.phase, self._run.directory
        self._parts = start_parts(self.settings, inputs, plan, session, directory, say, self.rollouter)
        self._checkpoints = RunCheckpoints(self.settings, self._run, self._parts)
        say("ready")

    def _join_ray(self) -> RaySession:
        return RaySession(self.settings)

    def _report_again(self) -> None:
        """With new reporters: the files of those before have changed."""
        self._reporters = ReporterSet.from_settings(self.settings)
        self._reporters.start(self.settings, self._run.directory)

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue the run that wrote a checked checkpoint."""
        state = checkpoint.state()
        self._checkpoints.count_from(state.counts)
        self._load(checkpoint, state, version=state.policy_version)

    def _rewind(self, error: StateLostError) -> None:
        """Go back to the newest checkpoint, all but the policy's version: replicas have seen the next ones already."""
        checkpoint = self._checkpoints.to_rewind_to(error)
        state = checkpoint.state()
        self._reporters.stop()
        self._run.directory.truncate_after(state.iteration)
        self._report_again()
        self._load(checkpoint, state, version=self._now.newest_version + 1)
        self._checkpoints.rewinds += 1

    def _load(self, checkpoint: Checkpoint, state: CheckpointState, *, version: int) -> None:
        """Take everything from a checkpoint, and call its policy ``version``."""
        parts = self._running()
        self._now = Iteration(version=self._now.newest_version)
        self._checkpoints.wait_pending()
        parts.weight_sync.wait_pending()
        # First: what is in flight would continue to ask for the version that it was admitted at.
        parts.controller.resume(version)
        parts.learners.load(checkpoint.learner, version)
        self._inputs.prompts.restore(state.prompt_position)
        self._now = Iteration.loaded(version)
        self._iteration, self._time_total = state.iteration, state.time_total_s
        self._publish_loaded()

    def _sample_evaluation(self) -> dict[str, Outcomes]:
        return self._evaluator.sample(self._settled().controller, self._now.version)

    def _evaluation_of(self, number: int) -> dict[str, dict[str, Any]] | None:
        """What the result of an iteration says of the held-out sets, if anything."""
        return self._evaluation() if evaluation_due(self.settings, number) else None

    def _evaluation(self) -> dict[str, dict[str, Any]]:
        with self._phase("evaluate"):
            return self.evaluate()

    def _evaluate_at_start(self) -> None:
        # Once, also where the first iteration fails and is asked for again.
        if self.iteration == 0 and not self._evaluated_at_start and evaluation_due(self.settings, 0):
            self._reporters.phase("evaluating")
            result = {"training_iteration": 0, "timestamp": int(time.time()), "evaluation": self.evaluate()}
            self._evaluated_at_start = True
            self._reporters.report(result)


@atexit.register
def _stop_all() -> None:
    """A script may end without ``stop()``, also by Ctrl-C; this runs before Ray's own exit handler."""
    stop_all(*((type(algorithm).__name__, algorithm.stop) for algorithm in list(_LIVE)))
