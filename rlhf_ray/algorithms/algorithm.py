"""The loop itself: prompts -> rollouts -> rewards -> advantages -> learner -> weight sync, one call a step.

:meth:`Algorithm.training_step` is the map of the house. Everything else here is what a user calls around it: ``train``,
``evaluate``, ``save_to_path``, ``from_checkpoint``, ``export_hf`` and ``stop``.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

from ray.tune import Trainable

from rlhf_ray.algorithms.assembly import (
    Inputs,
    Parts,
    check_inputs,
    evaluation_prompts,
    evaluation_sampling,
    start_parts,
)
from rlhf_ray.algorithms.iteration_result import evaluation_metrics, iteration_result
from rlhf_ray.algorithms.ray_session import RaySession
from rlhf_ray.checkpoints.checkpoint import Checkpoint
from rlhf_ray.config import AlgorithmConfig
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.packing import UpdatePlan, attention_length, plan_update
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.rewards.shaping import shaped
from rlhf_ray.settings import Settings
from rlhf_ray.types import Prompt, RewardFailure, ScoredGroup, Span

__all__ = ["Algorithm"]

_LIVE: weakref.WeakSet[Algorithm] = weakref.WeakSet()


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

    config_class: ClassVar[type[AlgorithmConfig]]

    def __init__(self, config: AlgorithmConfig | dict[str, Any] | None = None, storage: Any = None) -> None:
        if isinstance(config, AlgorithmConfig):
            config = config.to_dict()
        self._parts: Parts | None = None
        super().__init__(config=config, storage=storage)

    def setup(self, config: dict[str, Any]) -> None:
        """Check everything, then start learners, replicas and reward workers side by side."""
        self.algorithm_config = self.config_class.from_dict(config).validate().freeze()
        self.settings: Settings = self.algorithm_config.settings
        logging.getLogger("rlhf_ray").setLevel(self.settings.debugging.log_level)
        self._reporters = ReporterSet.from_settings(self.settings)
        self.policy_version = 0
        self._evaluation_set: tuple[str, tuple[Prompt, ...]] | None = None
        inputs = check_inputs(self.settings)
        directory = RunDirectory.create(
            self.settings.reporting.run_dir, algorithm=self.config_class.algorithm_name.lower()
        )
        self._directory = directory
        self._logdir = str(directory.path)
        # Without the folder's own name, so that the file reruns the run in a new one.
        resolved = self.algorithm_config.copy().reporting(run_dir=None)
        directory.write_config(resolved.to_yaml())
        self._reporters.start(self.settings, directory)
        _LIVE.add(self)
        try:
            self._start(inputs)
        except BaseException:
            self.stop()
            raise

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self._directory.path

    def training_step(self) -> dict[str, Any]:
        """One iteration; returns its result."""
        started = time.perf_counter()
        parts, version = self._running(), self.policy_version
        if parts.publications.version != version:  # What followed the last update failed.
            parts.publications.publish(version, beside=False)
        collected = parts.controller.collect(version)
        batch = shaped(
            SequenceBatch.from_groups(collected.groups, version=version),
            self.settings.rewards,
            mask_truncated=self.settings.training.mask_truncated,
        )
        plan = self._plan(batch, version)
        update_policy = version >= self.settings.training.critic_warmup_iterations
        figures = parts.learners.update(batch, plan, version=version + 1, update_policy=update_policy)
        self.policy_version = version + 1
        publication = parts.publications.publish(version + 1)
        iteration_s = time.perf_counter() - started
        self._report_completions(collected.groups)
        self._report_timeline(collected.spans)
        return iteration_result(
            collected,
            batch,
            plan,
            figures,
            publication,
            policy_version=version + 1,
            weight_sync_s=parts.publications.held_up_s,
            iteration_s=iteration_s,
            dropped_prompts=self._inputs.prompts.dropped,
            reward_workers_replaced=parts.rewards.workers_replaced,
        )

    def step(self) -> dict[str, Any]:
        """What ``train()`` runs: a training step, and evaluation and checkpoint where they are due."""
        result = self.training_step()
        number = self.iteration + 1
        if _due(self.settings.evaluation.interval, number):
            result["evaluation"] = self.evaluate()
        if _due(self.settings.checkpointing.interval, number):
            self._save_in_run_dir(number)
        result["done"] = number >= self.settings.training.iterations
        if self.settings.callbacks.on_train_result is not None:
            self.settings.callbacks.on_train_result(algorithm=self, result=result)
        return result

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Measure the current policy on the held-out set: ``{dataset: {"reward_mean": ...}}``.

        Empty when the run has its own training data and no ``data.eval_path``.
        """
        named = self._evaluate()
        if named is None:
            return {}
        metrics = {named[0]: evaluation_metrics(named[1])}
        if self.settings.callbacks.on_evaluate_end is not None:
            self.settings.callbacks.on_evaluate_end(algorithm=self, metrics=metrics)
        return metrics

    def sample_evaluation(self) -> tuple[ScoredGroup | RewardFailure, ...]:
        """The held-out completions themselves, in the order of the set."""
        named = self._evaluate()
        return () if named is None else named[1]

    def save_to_path(self, path: str | os.PathLike[str]) -> Path:
        """Write a checkpoint folder: policy, critic, optimisers, prompt position and counters.

        Returns:
            The folder, absolute.
        """
        checkpoint = Checkpoint(Path(path).expanduser().absolute())
        checkpoint.begin()
        self._running().learners.save(str(checkpoint.learner))
        checkpoint.commit(
            config=self._directory.config.read_text(),
            policy_version=self.policy_version,
            iteration=self.iteration,
            prompt_position=self._inputs.prompts.state(),
        )
        if self.settings.callbacks.on_checkpoint is not None:
            self.settings.callbacks.on_checkpoint(algorithm=self, path=checkpoint.path)
        return checkpoint.path

    def restore_from_path(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint folder, on any number of learners and replicas."""
        checkpoint = Checkpoint(Path(path).expanduser().absolute())
        state = checkpoint.read()
        parts = self._running()
        parts.publications.settle()
        # First: what is in flight would go on asking for the version that it was admitted at.
        parts.controller.resume(state.policy_version)
        parts.learners.load(str(checkpoint.learner), state.policy_version)
        self._inputs.prompts.restore(state.prompt_position)
        self.policy_version = state.policy_version
        if state.policy_version > 0 or parts.publications.version != 0:
            parts.publications.publish(state.policy_version, beside=False)
        self._iteration = state.iteration

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], config: AlgorithmConfig | None = None) -> Algorithm:
        """Build an algorithm from a checkpoint folder, in a new run directory.

        Args:
            path: What ``save_to_path`` wrote.
            config: Settings to use instead of the checkpoint's own; needed where those hold a closure.
        """
        checkpoint = Checkpoint(Path(path).expanduser().absolute())
        checkpoint.read()
        if config is None:
            config = cls.config_class.from_yaml(checkpoint.config)
        algorithm = cls(config=config)
        try:
            algorithm.restore_from_path(path)
        except BaseException:
            algorithm.stop()
            raise
        return algorithm

    def export_hf(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy, and the critic under ``critic/``, as folders that transformers and vLLM load."""
        from rlhf_ray.prompts.tokenizer import load_tokenizer

        folder = Path(path).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._running().learners.export(str(folder))
        trust = self.settings.model.trust_remote_code
        load_tokenizer(self._inputs.tokenizer_path, trust_remote_code=trust).save_pretrained(folder)
        return folder

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Tune's way to :meth:`save_to_path`."""
        self.save_to_path(checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Ray Tune's way to :meth:`restore_from_path`."""
        self.restore_from_path(checkpoint)

    def log_result(self, result: dict[str, Any]) -> None:
        """Hand the finished result to the reporters; called by ``train()``."""
        self._reporters.report(result)

    def cleanup(self) -> None:
        """Stop every process, actor, Serve app and placement group of this run; called by ``stop()``."""
        _LIVE.discard(self)
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.stop()
        elif getattr(self, "_session", None) is not None:
            self._session.stop()
        self._reporters.stop()

    def stop(self) -> None:
        """Leave nothing behind; may be called again, and before set-up has finished."""
        if hasattr(self, "_monitor"):
            super().stop()
        else:
            self.cleanup()

    def _setup_logdir(self) -> None:
        # Outside Tune the run directory is made in set-up; Ray's default would leave a folder in the user's home.
        if self._storage:
            super()._setup_logdir()

    def _start(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._reporters.phase("starting Ray")
        self._session = RaySession(self.settings)
        self._parts = start_parts(self.settings, inputs, self._directory, self._reporters, self._session)
        self._reporters.phase("ready")

    def _running(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("this algorithm was stopped; build a new one")
        return self._parts

    def _plan(self, batch: SequenceBatch, version: int) -> UpdatePlan:
        training, learners = self.settings.training, self.settings.learners
        return plan_update(
            batch.lengths.tolist(),
            batch.loss_lengths.tolist(),
            num_minibatches=training.num_minibatches,
            num_epochs=training.num_epochs,
            num_ranks=learners.num_learners,
            max_tokens=learners.max_tokens_per_microbatch,
            attention_length=attention_length(self._inputs.model_config.get_text_config().hidden_size),
            packed=self._running().learners.packed,
            seed=self.settings.debugging.seed * 1_000_003 + version,
        )

    def _evaluate(self) -> tuple[str, tuple[ScoredGroup | RewardFailure, ...]] | None:
        if self._evaluation_set is None:
            self._evaluation_set = evaluation_prompts(self.settings, self._inputs)
        if self._evaluation_set is None:
            return None
        name, prompts = self._evaluation_set
        sampling = evaluation_sampling(self.settings)
        return name, self._running().controller.score_prompts(prompts, sampling, self.policy_version)

    def _report_completions(self, groups: tuple[ScoredGroup, ...]) -> None:
        if _due(self.settings.reporting.completions_interval, self.iteration + 1):
            self._reporters.report_completions(self.iteration + 1, groups)

    def _report_timeline(self, spans: tuple[Span, ...]) -> None:
        if self.settings.reporting.timeline_interval > 0:
            # In every iteration, or one that is written would have those of several.
            others = self._running().learners.take_spans()
            if _due(self.settings.reporting.timeline_interval, self.iteration + 1):
                self._reporters.report_spans(self.iteration + 1, (*spans, *others))

    def _save_in_run_dir(self, number: int) -> None:
        self.save_to_path(self._directory.checkpoints / f"iteration_{number:06d}")
        Checkpoint.prune(self._directory.checkpoints, keep=self.settings.checkpointing.keep)


def _due(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0


@atexit.register
def _stop_all() -> None:
    """A script may end without ``stop()``, also by Ctrl-C; this runs before Ray's own exit handler."""
    for algorithm in list(_LIVE):
        algorithm.stop()
