"""Starts the parts of a run as its plan says, everything slow at the same time, and stops them."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rlhf_ray.algorithm.inputs import Inputs
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.algorithm.run_plan import RunPlan
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.environments.pool import EnvironmentPool, PoolSettings
from rlhf_ray.environments.worker import WorkerSettings
from rlhf_ray.learner.remote.group import LearnerGroup
from rlhf_ray.pickling import serialize
from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.prompts.tokenizer import load_tokenizer, read_chat_template
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.functions import rewards_of_run
from rlhf_ray.rewards.pool import RewardPool
from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.rollouts.app import RolloutApp
from rlhf_ray.rollouts.controller import RolloutController
from rlhf_ray.rollouts.episodes import MultiTurn, TurnLimits
from rlhf_ray.rollouts.flow import RolloutFlow, training_sampling
from rlhf_ray.rollouts.rollouter import Engine, Rollouter
from rlhf_ray.rollouts.streams import GroupStreams
from rlhf_ray.stopping import stop_all
from rlhf_ray.weight_sync.publisher import DirectPublisher, ObjectStorePublisher
from rlhf_ray.weight_sync.scheduler import WeightSyncScheduler

__all__ = ["Parts", "start_parts", "training_progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The running parts of an algorithm."""

    session: RaySession
    prompts: PromptStream
    learners: LearnerGroup
    app: RolloutApp
    rewards: RewardPool
    environments: EnvironmentPool | None
    """``None``: a completion is all."""
    controller: RolloutController
    weight_sync: WeightSyncScheduler

    def stop(self) -> None:
        """Stop all, in an order in which none waits for one that is gone."""
        stop_all(
            ("weight sync", self.weight_sync.stop),
            ("rollout controller", self.controller.stop),
            # After the controller, which would open it again.
            ("prompts", self.prompts.close),
            ("reward workers", self.rewards.stop),
            *(() if self.environments is None else (("environment workers", self.environments.stop),)),
            ("rollout replicas", self.app.stop),
            ("learners", self.learners.stop),
            ("Ray", self.session.stop),
        )


def start_parts(
    settings: Settings,
    inputs: Inputs,
    plan: RunPlan,
    session: RaySession,
    run_dir: RunDirectory,
    say: Callable[[str], None],
    rollouter: Rollouter,
) -> Parts:
    """Start learners, replicas and reward workers at the same time and wait until all are ready.

    Where one of them fails, or anything else on the way, all that was started is stopped before the error is raised.
    """
    # Not the directory's name alone: the application of a driver that was killed may still be there.
    run_id = f"{run_dir.ray_name}-{uuid.uuid4().hex[:6]}"
    begun: list[tuple[str, Callable[[], object]]] = [("prompts", inputs.prompts.close)]
    try:
        learners = _learner_group(settings, plan, run_id, run_dir)
        begun.append(("learners", learners.stop))
        app = _rollout_app(settings, plan, run_id, learners.bridge, ray_ends=session.ends_ray)
        begun.append(("rollout replicas", app.stop))
        portable_tokenizer = _portable_tokenizer(settings, inputs)
        rewards = RewardPool(
            rewards_of_run(settings),
            run_id=run_id,
            tokenizer_path=inputs.tokenizer_path,
            tokenizer=portable_tokenizer,
            trust_remote_code=settings.model.trust_remote_code,
            num_cpus=plan.placement.shares.reward_worker,
            on_gpu=plan.placement.device.on_gpu,
        )
        begun.append(("reward workers", rewards.stop))
        environments = _environment_pool(settings, inputs, plan, portable_tokenizer)
        if environments is not None:
            begun.append(("environment workers", environments.stop))
            rollouter = _multi_turn(settings, inputs, environments)
        session.begun(app.name, learners.bridge)
        colocated = plan.placement.device.colocated
        if colocated:
            # Replicas take the larger shares of the GPUs, and must have them before learners come.
            app.start()
            say("placing rollout replicas")
            app.wait_placed(learners.replicas_are_placed)
            learners.start()
        else:
            learners.start()
            app.start(after=learners.wait_placed)
        # The dataset is read in this thread while the others wait for processes.
        inputs.prompts.open()
        rewards.progress = training_progress(settings, inputs)
        _wait(learners, app, rewards, environments, say, in_turn=colocated)
        session.started()
        controller = _controller(settings, inputs, app, learners, rewards, rollouter)
        begun.append(("rollout controller", controller.stop))
        return Parts(
            session=session,
            prompts=inputs.prompts,
            learners=learners,
            app=app,
            rewards=rewards,
            environments=environments,
            controller=controller,
            weight_sync=_weight_sync(settings, plan, app, learners, controller),
        )
    except BaseException:
        stop_all(*reversed(begun))
        raise


def training_progress(settings: Settings, inputs: Inputs) -> TrainingProgress:
    """How what reward functions are told of the training follows from the policy version."""
    schedule = Schedule(settings)
    return TrainingProgress(
        steps_per_version=schedule.optimizer_steps,
        max_steps=schedule.total_optimizer_steps,
        epochs_per_version=settings.data.batch_size / inputs.prompts.num_rows,
    )


def _learner_group(settings: Settings, plan: RunPlan, run_id: str, run_dir: RunDirectory) -> LearnerGroup:
    learners = settings.learners
    return LearnerGroup(
        spec=plan.learner,
        run_id=run_id,
        num_learners=learners.num_learners,
        num_cpus=plan.placement.shares.learner,
        # Ray Train's own bookkeeping; hidden, since nothing in it is for the user.
        storage_path=str(run_dir.path / ".ray_train"),
        startup_timeout_s=learners.startup_timeout_s,
        update_timeout_s=learners.update_timeout_s,
        max_restarts=settings.fault_tolerance.max_learner_restarts,
        state_interval=settings.fault_tolerance.state_interval if settings.fault_tolerance.keeps_state else 0,
        tensor_parallel_size=settings.rollouts.tensor_parallel_size,
        num_replicas=settings.rollouts.num_replicas,
    )


def _rollout_app(settings: Settings, plan: RunPlan, run_id: str, bridge: Any, *, ray_ends: bool) -> RolloutApp:
    return RolloutApp(
        run_id=run_id,
        spec=plan.engine,
        num_replicas=settings.rollouts.num_replicas,
        num_cpus=plan.placement.shares.replica,
        bridge=bridge,
        startup_timeout_s=settings.rollouts.startup_timeout_s,
        ray_ends=ray_ends,
    )


def _controller(
    settings: Settings,
    inputs: Inputs,
    app: RolloutApp,
    learners: LearnerGroup,
    rewards: RewardPool,
    rollouter: Rollouter,
) -> RolloutController:
    handle = app.handle

    def generate(replica_id: str) -> Callable[..., Any]:
        options = {"session_id": replica_id} if replica_id else {}
        remote: Callable[..., Any] = handle.options(stream=True, **options).generate.remote
        return remote

    streams = GroupStreams(generate, num_replicas=settings.rollouts.num_replicas)
    engine = Engine(
        generate=streams.generate,
        sampling=training_sampling(settings),
        max_retries=settings.fault_tolerance.max_group_retries,
        timeout_s=settings.rollouts.timeout_s,
    )
    rules = FlowRules.of(settings, greedy_baseline=inputs.advantage.needs_greedy_rewards)
    flow = RolloutFlow(rollouter=rollouter, engine=engine, scorer=rewards, prompts=inputs.prompts, rules=rules)
    return RolloutController(flow, while_waiting=learners.restore_restarted_ranks)


def _environment_pool(settings: Settings, inputs: Inputs, plan: RunPlan, tokenizer: Any) -> EnvironmentPool | None:
    environment, shares = settings.environment, plan.placement.shares
    if not inputs.environments:
        return None
    assert shares.environment_worker is not None
    worker = WorkerSettings(
        environments=tuple(one.serialized() for one in inputs.environments),
        tokenizer=inputs.tokenizer_path if tokenizer is None else serialize(tokenizer, defined_by=tokenizer),
        trust_remote_code=settings.model.trust_remote_code,
        chat_template=read_chat_template(settings.data.chat_template),
        chat_template_kwargs=settings.data.chat_template_kwargs,
        tools=_tools(inputs),
        keep_reasoning=environment.keep_reasoning,
        parses_tools=environment.tool_parser is not None,
        prompt_column=settings.data.prompt_column,
        temperature=settings.rollouts.temperature,
    )
    return EnvironmentPool(
        PoolSettings(
            worker=worker,
            deterministic=frozenset(
                one.name for one in inputs.environments if one.deterministic and environment.replay
            ),
            num_workers=environment.num_workers,
            num_cpus=shares.environment_worker,
            step_timeout_s=environment.step_timeout_s,
            startup_timeout_s=environment.startup_timeout_s,
            runtime_env=environment.runtime_env,
        )
    )


def _multi_turn(settings: Settings, inputs: Inputs, pool: EnvironmentPool) -> MultiTurn:
    environment = settings.environment
    return MultiTurn(
        pool,
        TurnLimits.of(settings, inputs.max_prompt_tokens),
        names=[one.name for one in inputs.environments],
        column=environment.column,
        parse=environment.tool_parser is not None or environment.reasoning_parser is not None,
        tools=json.dumps(_tools(inputs)) if _tools(inputs) else "",
    )


def _tools(inputs: Inputs) -> tuple[Mapping[str, Any], ...]:
    """Schemas that prompts name."""
    return tuple(schema for one in inputs.environments for schema in one.tools)


def _weight_sync(
    settings: Settings, plan: RunPlan, app: RolloutApp, learners: LearnerGroup, controller: RolloutController
) -> WeightSyncScheduler:
    sends = plan.engine.weight_transfer != "shared_memory"
    return WeightSyncScheduler(
        DirectPublisher(source=learners, handle=app.handle)
        if sends
        else ObjectStorePublisher(source=learners, handle=app.handle, max_paused=settings.rollouts.max_paused_replicas),
        published=controller.published,
        overlaps_training=settings.rollouts.max_staleness > 0 and not sends,
    )


def _wait(
    learners: LearnerGroup,
    app: RolloutApp,
    rewards: RewardPool,
    environments: EnvironmentPool | None,
    say: Callable[[str], None],
    *,
    in_turn: bool,
) -> None:
    """Wait for all of them; the first that fails ends the wait for the others."""
    stopped = threading.Event()

    def start_rewards() -> None:
        learners.wait_placed(stopped)  # Reward models may take GPUs too.
        if not stopped.is_set():
            rewards.start()

    def wait_for_app() -> None:
        if in_turn:  # Engines are built when learners have left: their time begins then.
            wait([learners_ready])
        app.wait_ready()

    with ThreadPoolExecutor(4, "start-up") as pool:
        learners_ready = pool.submit(learners.wait_ready)
        pending = {
            learners_ready: "learners",
            pool.submit(wait_for_app): "rollout replicas",
            pool.submit(start_rewards): "reward workers",
        }
        if environments is not None:
            pending[pool.submit(environments.start)] = "environment workers"
        try:
            while pending:
                say("starting " + ", ".join(sorted(pending.values())))
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    pending.pop(future)
                    future.result()
        except BaseException:
            # The other waits end when what they wait for is stopped.
            stopped.set()
            stop_all(("reward workers", rewards.stop), ("rollout replicas", app.stop), ("learners", learners.stop))
            raise


def _portable_tokenizer(settings: Settings, inputs: Inputs) -> Any:
    """The tokenizer itself for the reward workers, which saves them the import of most of transformers.

    ``None`` where its class came with the model: that can be imported only from the model's own files.
    """
    tokenizer = load_tokenizer(inputs.tokenizer_path, trust_remote_code=settings.model.trust_remote_code)
    return tokenizer if type(tokenizer).__module__.startswith("transformers.") else None
