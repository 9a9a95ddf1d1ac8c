"""An algorithm that may be a Ray Tune trial: where it writes, what it waits for, and how it becomes another trial."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ray import cloudpickle
from ray.tune import PlacementGroupFactory

from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.algorithm.iteration import Iteration
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.algorithm.resuming import RunStart, open_trial_run
from rlhf_ray.algorithm.run_plan import Cluster, Placement, learner_spec
from rlhf_ray.algorithm.start import training_progress
from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.evaluation.evaluator import Evaluator
from rlhf_ray.rollouts.engine_spec import longest_completion
from rlhf_ray.stopping import stop_all
from rlhf_ray.tune.reservation import Reservation
from rlhf_ray.tune.storage import folder_to_read, folder_to_write
from rlhf_ray.tune.supervisor import Resources

__all__ = ["TRIAL_CPUS", "Trial", "TrialAlgorithm", "TrialSession", "same_parts"]

TRIAL_CPUS = 0.1

"""CPUs that Tune reserves for a trial's own process.

Little, because trials that wait for resources hold it too: on a small machine more would leave nothing to wait for.
"""


_Config = TypeVar("_Config", bound=AlgorithmConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    name: str
    folder: Path
    """The trial's own, where its result.json is if that is on a file system of this machine."""
    cpus: float
    """What Tune reserved for the trial's own process."""

    @classmethod
    def of(cls, trainable: Any) -> Self | None:
        """The trial that a Trainable runs in; ``None`` outside of Tune."""
        storage = trainable._storage
        if storage is None:
            return None
        is_local = storage.storage_filesystem.type_name == "local"
        reserved = trainable.trial_resources
        return cls(
            name=trainable.trial_name,
            folder=Path(storage.trial_fs_path if is_local else storage.trial_working_directory),
            cpus=TRIAL_CPUS if reserved is None else float(reserved.required_resources.get("CPU", 0.0)),
        )

    def adapted(self, config: _Config) -> _Config:
        """The settings with folders of this trial's own, and the console left to Tune's table.

        Raises:
            ConfigError: ``checkpointing.resume`` is set: Tune itself decides what a trial resumes from.
        """
        reporting, checkpointing = config.settings.reporting, config.settings.checkpointing
        if checkpointing.resume != "never":
            remedy = "use never in a trial; tune.Tuner.restore(path, trainable=...) resumes a sweep"
            raise ConfigError("checkpointing.resume", checkpointing.resume, remedy)
        parent = self.folder if reporting.run_dir is None else Path(reporting.run_dir).expanduser().absolute()
        adapted = config.copy().reporting(
            run_dir=str(parent / self.name), progress="plain" if reporting.progress == "plain" else "off"
        )
        if checkpointing.path is not None:
            adapted.checkpointing(path=str(Folder.at(checkpointing.path) / self.name))
        return adapted


# Read by the trial itself, when they are needed; of evaluation the engines know the longest completion.
_LIVE = frozenset({"evaluation", "callbacks"})

# These decide which parts there are: a critic, greedy completions, functions that replicas and learners were sent.
_FIXED_TRAINING = frozenset({"advantage", "advantage_args", "loss", "loss_args"})

_OWN_FOLDERS = {"reporting": "run_dir", "checkpointing": "path"}


def same_parts(old: Settings, new: Settings) -> bool:
    """Whether the running parts of one trial serve another: only the learners' numbers and what is read here differ."""
    if longest_completion(old.rollouts, old.evaluation) != longest_completion(new.rollouts, new.evaluation):
        return False
    for section in fields(Settings):
        if section.name in _LIVE:
            continue
        before, after = getattr(old, section.name), getattr(new, section.name)
        names = {one.name for one in fields(before) if _differ(getattr(before, one.name), getattr(after, one.name))}
        if section.name == "training":
            names &= _FIXED_TRAINING
        if names - {_OWN_FOLDERS.get(section.name)}:
            return False
    return True


def _differ(before: Any, after: Any) -> bool:
    # A function of a script or a notebook comes to a trial as a copy, another one each time.
    return bool(before != after) and cloudpickle.dumps(before) != cloudpickle.dumps(after)


class TrialSession(RaySession):
    """The session of a trial, which waits until the cluster has capacity for all of its parts.

    Args:
        settings: The trial's settings.
        trial: What Tune reserved for the trial itself.
    """

    def __init__(self, settings: Settings, trial: Trial) -> None:
        self._trial = trial
        self._reservation: Reservation | None = None
        super().__init__(settings)

    def begun(self, app_name: str, bridge: Any) -> None:
        """Have the parts removed should this process be killed."""
        if self._reservation is not None:
            self._reservation.watch(app_name, bridge)

    def started(self) -> None:
        """Let the next trial start."""
        if self._reservation is not None:
            self._reservation.started()

    def stop(self) -> None:
        """Give the place back, and leave the cluster."""
        reservation, self._reservation = self._reservation, None
        steps: list[tuple[str, Callable[[], object]]] = [("Ray", super().stop)]
        if reservation is not None:
            steps.insert(0, ("the trial's place on the cluster", reservation.end))
        stop_all(*steps)

    def _placed(self, settings: Settings, cluster: Cluster) -> Placement:
        from rlhf_ray.tune.supervisor import trial_supervisor

        offered: dict[Resources, Placement] = {}

        def taken(cpus: float) -> Resources:
            placement = super(TrialSession, self)._placed(settings, replace(cluster, cpus=cpus))
            device = placement.device
            resources = Resources(cpus=placement.cpus, gpus=placement.gpus, in_pairs=device.colocated and device.on_gpu)
            offered[resources] = placement
            return resources

        cpus = cluster.cpus - self._trial.cpus
        self._reservation = Reservation(
            trial_supervisor, need=taken(cpus), reduced=lambda free: taken(min(cpus, free.cpus))
        )
        return offered[self._reservation.resources]


class TrialAlgorithm(Algorithm):
    """What the Trainables PPO, GRPO and so on are made of; outside of Ray Tune an :class:`Algorithm`."""

    _trial: Trial | None = None
    _reports_started = True
    _newest_evaluation: dict[str, dict[str, Any]] | None = None

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What Ray Tune reserves for a trial: its own process alone.

        Serve, Ray Train and the reward workers reserve for themselves, outside of the trial's placement group, and a
        trial waits until there is capacity for all of them.
        """
        return PlacementGroupFactory([{"CPU": TRIAL_CPUS}])

    def step(self) -> dict[str, Any]:
        """See :meth:`Algorithm.step`."""
        if not self._reports_started:  # Only now is it known from which iteration a trial that was restarted continues.
            self._reports_started = True
            self._run.adopt_run(self.iteration)
            self._reporters.start(self.settings, self._run.directory)
        return super().step()

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

        Where only numbers of the training section differ, all processes are kept, which saves most of the start of a
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
            self._restart_training()
        except BaseException:
            self.cleanup()
            raise
        return True

    def _restart_training(self) -> None:
        """With the same processes: policy, critic, optimizers and prompts as after a start."""
        parts = self._running()
        self._evaluator = Evaluator(self.settings, self._inputs.held_out)
        self._checkpoints.renew(self.settings, self._run)
        parts.weight_sync.wait_pending()
        parts.controller.resume(0)
        parts.learners.renew(learner_spec(self.settings, self._inputs, parts.session.placement.device))
        self._inputs.prompts.restore(self._first_position)
        parts.rewards.progress = training_progress(self.settings, self._inputs)
        self._now = Iteration.loaded(0)
        self._publish_loaded()

    def _setup_logdir(self) -> None:
        # Ray's own would also change the working directory, and relative paths would no longer be the user's.
        if self._storage:
            os.environ.setdefault("TUNE_ORIG_WORKING_DIR", os.getcwd())
            self._logdir = self._storage.trial_working_directory
            os.makedirs(self._logdir, exist_ok=True)

    def _checked(self, config: dict[str, Any]) -> AlgorithmConfig:
        self._trial = Trial.of(self)
        if self._trial is None:
            return super()._checked(config)
        return self._trial.adapted(self.config_class.from_dict(config)).validate().freeze()

    def _use(self, config: AlgorithmConfig) -> None:
        super()._use(config)
        self._newest_evaluation = None

    def _open_run(self) -> RunStart:
        if self._trial is None:
            return super()._open_run()
        if hasattr(self, "_run"):  # That of the trial before, or of the same one.
            self._run.lock.release()
        run = self._run = open_trial_run(self.algorithm_config)
        self._reports_started = not run.has_history
        if self._reports_started:
            self._reporters.start(self.settings, run.directory)
        return run

    def _join_ray(self) -> RaySession:
        return super()._join_ray() if self._trial is None else TrialSession(self.settings, self._trial)

    def _load(self, checkpoint: Checkpoint, state: CheckpointState, *, version: int) -> None:
        self._newest_evaluation = None
        super()._load(checkpoint, state, version=version)

    def _evaluation_of(self, number: int) -> dict[str, dict[str, Any]] | None:
        """As every algorithm, and in every result of a trial: Ray Tune stops a sweep whose metric is missing in one.

        A trial is evaluated in its first iteration too, and repeats the newest evaluation until the next.
        """
        found = super()._evaluation_of(number)
        if self._trial is None:
            return found
        evaluation = self.settings.evaluation
        if found is None and self._newest_evaluation is None and (evaluation.interval or evaluation.at_end):
            found = self._evaluation()
        if found is not None:
            self._newest_evaluation = found
        return self._newest_evaluation
