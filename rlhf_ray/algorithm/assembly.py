"""Builds a run's parts from its settings, cheap checks first, then everything slow side by side.

The order matters to the user: what can be wrong with names, files and models is found in seconds, before any engine
starts.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithm.ray_connection import cluster_to_join
from rlhf_ray.algorithm.ray_session import RaySession
from rlhf_ray.config.checks import check_advantage, check_attention_device, check_loss
from rlhf_ray.config.plugins import Plugin, advantage_plugin, loss_plugin
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.evaluation.evaluator import Evaluator
from rlhf_ray.evaluation.held_out_sets import HeldOutSet, held_out_sets
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.learner.models import check_compile_backend
from rlhf_ray.learner.remote.group import LearnerGroup
from rlhf_ray.models.config import (
    check_causal,
    check_critic_vocabulary,
    check_sequence_parallel,
    check_vocabulary,
    load_model_config,
)
from rlhf_ray.models.path import absolute_if_local
from rlhf_ray.prompts.evaluation_prompts import check_prompts, load_prompts
from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.reporting.run_directory import RunDirectory
from rlhf_ray.rewards.arguments import TrainingProgress
from rlhf_ray.rewards.functions import resolve_rewards
from rlhf_ray.rewards.registry import row_check
from rlhf_ray.rewards.reward_model.check import check_reward_model
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rewards.shipping import pack
from rlhf_ray.rewards.stage import RewardStage, reward_stage
from rlhf_ray.rollouts.admission import max_concurrent_groups
from rlhf_ray.rollouts.app import RolloutApp
from rlhf_ray.rollouts.controller import RolloutController
from rlhf_ray.rollouts.engine_spec import (
    check_quantization,
    check_served,
    engine_spec,
    eos_token_ids,
    max_prompt_tokens,
    vllm_build,
    weight_transfer,
)
from rlhf_ray.rollouts.flow import RolloutFlow
from rlhf_ray.rollouts.streams import GroupStreams
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Prompt, SamplingSettings
from rlhf_ray.weight_sync.publications import Publications
from rlhf_ray.weight_sync.publisher import DirectPublisher, ObjectStorePublisher, Publisher

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Inputs", "Parts", "check_inputs", "evaluator", "learner_spec", "start_parts", "training_progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was read and checked before anything was started."""

    policy_path: str
    critic_path: str | None
    """``None``: the advantage needs no critic."""
    advantage: Plugin
    loss: Plugin
    tokenizer_path: str
    model_config: PretrainedConfig
    eos_token_ids: tuple[int, ...]
    """What ends a completion, besides ``rollouts.stop_token_ids``."""
    max_prompt_tokens: int
    vocabulary_size: int
    """Tokens that the policy has an embedding for."""
    prompts: PromptStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The running parts of an algorithm."""

    session: RaySession
    prompts: PromptStream
    learners: LearnerGroup
    app: RolloutApp
    rewards: RewardStage
    controller: RolloutController
    publications: Publications

    def stop(self) -> None:
        """Stop all, in an order in which nobody waits for one that is gone."""
        stop_all(
            ("publication", self.publications.stop),
            ("rollout controller", self.controller.stop),
            # After the controller, which would open it again.
            ("prompts", self.prompts.close),
            ("reward workers", self.rewards.stop),
            ("rollout replicas", self.app.stop),
            ("learners", self.learners.stop),
            ("Ray", self.session.stop),
        )


def check_inputs(settings: Settings) -> Inputs:
    """Read model, tokenizer, rewards and data far enough to know that the run can start.

    Raises:
        ConfigError: A model, tokenizer, reward or length is wrong.
        DataError: A dataset is missing, empty, lacks a column, or has an answer that a reward cannot use.
    """
    from rlhf_ray.quickstart import model_path

    policy_path = _expanded(settings.model.path) or model_path()
    tokenizer_path = _expanded(settings.model.tokenizer_path) or policy_path
    critic_path = _expanded(settings.model.critic_path)
    trust = settings.model.trust_remote_code
    rewards = resolve_rewards(settings.rewards)
    for index, reward in enumerate(rewards):
        if isinstance(reward.function, RewardModelReward):
            check_reward_model(reward.function, f"rewards.functions[{index}]")
    advantage = advantage_plugin(settings.training.advantage, settings.training.advantage_args)
    check_advantage(advantage, settings)
    loss = loss_plugin(settings.training.loss, settings.training.loss_args)
    check_loss(loss, settings)
    if settings.learners.compile_backend is not None:
        check_compile_backend(settings.learners.compile_backend)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust)
    config = load_model_config("model.path", policy_path, trust_remote_code=trust)
    check_causal("model.path", policy_path, config)
    check_sequence_parallel(settings.learners.sequence_parallel, "model.path", config)
    check_served(policy_path, config, on_cpus=_runs_on_cpus(settings))
    check_quantization(settings.rollouts.quantization, on_cpus=_runs_on_cpus(settings))
    if critic_path is not None:
        critic = load_model_config("model.critic_path", critic_path, trust_remote_code=trust)
        check_critic_vocabulary(critic_path, critic, tokenizer, config)
        check_sequence_parallel(settings.learners.sequence_parallel, "model.critic_path", critic)
    stops = settings.rollouts.stop_token_ids
    eos = eos_token_ids(policy_path, config, tokenizer, stop_token_ids=stops)
    prompt_tokens = max_prompt_tokens(settings.rollouts, settings.evaluation, config)
    vocabulary_size = check_vocabulary(tokenizer, config)

    prompts = PromptStream(
        settings.data,
        tokenizer_path=tokenizer_path,
        max_prompt_tokens=prompt_tokens,
        seed=settings.debugging.seed,
        vocabulary_size=vocabulary_size,
        trust_remote_code=trust,
    )
    check_row = row_check(rewards)
    # A stop string may be the end of a turn; only token ids can be compared.
    prompts.check(check_row, stop_token_ids=None if settings.rollouts.stop else {*eos, *stops})
    for held_out in held_out_sets(settings.data):
        check_prompts(
            held_out.data,
            field=held_out.field,
            tokenizer_path=tokenizer_path,
            max_prompt_tokens=prompt_tokens,
            vocabulary_size=vocabulary_size,
            trust_remote_code=trust,
            check_row=check_row,
        )
    return Inputs(
        policy_path=policy_path,
        critic_path=(critic_path or policy_path) if advantage.needs_critic else None,
        advantage=advantage,
        loss=loss,
        tokenizer_path=tokenizer_path,
        model_config=config,
        eos_token_ids=eos,
        max_prompt_tokens=prompt_tokens,
        vocabulary_size=vocabulary_size,
        prompts=prompts,
    )


def evaluator(settings: Settings, inputs: Inputs) -> Evaluator:
    """What measures the policy on the held-out sets; they are read when they are first needed."""

    def load(held_out: HeldOutSet) -> tuple[Prompt, ...]:
        return load_prompts(
            held_out.data,
            field=held_out.field,
            tokenizer_path=inputs.tokenizer_path,
            max_prompt_tokens=inputs.max_prompt_tokens,
            limit=settings.evaluation.num_prompts,
            vocabulary_size=inputs.vocabulary_size,
            trust_remote_code=settings.model.trust_remote_code,
        )

    return Evaluator(settings, load)


def start_parts(
    settings: Settings, inputs: Inputs, run_dir: RunDirectory, reporters: ReporterSet, session: RaySession
) -> Parts:
    """Start learners, replicas and reward workers side by side and wait until all are ready.

    Where one of them fails, or anything else on the way, all that was started is stopped before the error is raised.
    """
    begun: list[tuple[str, Callable[[], object]]] = [("prompts", inputs.prompts.close)]
    try:
        return _started_parts(settings, inputs, run_dir, reporters, session, begun)
    except BaseException:
        stop_all(*reversed(begun))
        raise


def _started_parts(
    settings: Settings,
    inputs: Inputs,
    run_dir: RunDirectory,
    reporters: ReporterSet,
    session: RaySession,
    begun: list[tuple[str, Callable[[], object]]],
) -> Parts:
    """Start all parts; what ends each of them is added to ``begun`` as soon as there is something to end."""
    # Not the directory's name alone: the application of a driver that was killed may still be there.
    run_id = f"{run_dir.ray_name}-{uuid.uuid4().hex[:6]}"
    learners = _learner_group(settings, inputs, run_id, run_dir, session)
    begun.append(("learners", learners.stop))
    app = _rollout_app(settings, inputs, run_id, learners.bridge, session)
    begun.append(("rollout replicas", app.stop))
    rewards = reward_stage(
        settings.rewards,
        run_id=run_id,
        tokenizer_path=inputs.tokenizer_path,
        tokenizer=_portable_tokenizer(settings, inputs),
        trust_remote_code=settings.model.trust_remote_code,
        num_cpus=session.shares.reward_worker,
        on_gpu=session.on_gpu,
    )
    begun.append(("reward workers", rewards.stop))
    if session.reservation is not None:
        session.reservation.watch(app.name, learners.bridge)
    if session.colocated:
        # Replicas take the larger shares of the GPUs, and must have them before learners come.
        app.start()
        reporters.phase("placing rollout replicas")
        app.wait_placed(learners.replicas_are_placed)
        learners.start()
    else:
        learners.start()
        app.start(after=learners.wait_placed)
    # The dataset is read in this thread while the others wait for processes.
    inputs.prompts.open()
    rewards.progress = training_progress(settings, inputs)
    _wait(learners, app, rewards, reporters, in_turn=session.colocated)
    if session.reservation is not None:
        session.reservation.started()
    sends = _weight_transfer(settings, session) != "shared_memory"
    publisher: Publisher = (
        DirectPublisher(source=learners, handle=app.handle)
        if sends
        else ObjectStorePublisher(source=learners, handle=app.handle, max_paused=settings.rollouts.max_paused_replicas)
    )
    streams = GroupStreams(app.handle.options(stream=True).generate.remote, num_replicas=settings.rollouts.num_replicas)
    flow = RolloutFlow(
        generate=streams.generate,
        scorer=rewards,
        prompts=inputs.prompts,
        sampling=training_sampling(settings),
        batch_size=settings.data.batch_size,
        max_staleness=settings.rollouts.max_staleness,
        max_concurrent=max_concurrent_groups(settings),
        max_retries=settings.fault_tolerance.max_group_retries,
        max_failures=_first_given(settings.rewards.max_failures, settings.data.batch_size),
        max_equal_groups=_first_given(settings.rollouts.max_dropped_groups, 10 * settings.data.batch_size)
        if settings.rollouts.dynamic_sampling
        else None,
        partial_rollouts=settings.rollouts.partial_rollouts,
        greedy_baseline=inputs.advantage.needs_greedy_rewards,
        timeout_s=settings.rollouts.timeout_s,
        stall_timeout_s=settings.rollouts.stall_timeout_s,
        seed=settings.debugging.seed,
    )
    controller = RolloutController(flow, while_waiting=learners.attend)
    begun.append(("rollout controller", controller.stop))
    return Parts(
        session=session,
        prompts=inputs.prompts,
        learners=learners,
        app=app,
        rewards=rewards,
        controller=controller,
        publications=Publications(
            publisher,
            published=controller.published,
            beside_training=settings.rollouts.max_staleness > 0 and not sends,
        ),
    )


def training_progress(settings: Settings, inputs: Inputs) -> TrainingProgress:
    """How what reward functions are told of the training follows from the policy version."""
    schedule = Schedule.of(settings)
    return TrainingProgress(
        steps_per_version=schedule.optimizer_steps,
        max_steps=schedule.total_optimizer_steps,
        epochs_per_version=schedule.prompts / inputs.prompts.num_rows,
    )


def training_sampling(settings: Settings) -> SamplingSettings:
    """How completions are drawn in training."""
    rollouts = settings.rollouts
    return SamplingSettings(
        group_size=rollouts.group_size,
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        stop=tuple(rollouts.stop),
        stop_token_ids=tuple(rollouts.stop_token_ids),
    )


def _wait(
    learners: LearnerGroup, app: RolloutApp, rewards: RewardStage, reporters: ReporterSet, *, in_turn: bool
) -> None:
    """Wait for all three; the first that fails ends the wait for the others."""
    stopped = threading.Event()

    def start_rewards() -> None:
        learners.wait_placed(stopped)  # Reward models may take GPUs too.
        if not stopped.is_set():
            rewards.start()

    def wait_for_app() -> None:
        if in_turn:  # Engines are built when learners have left: their time begins then.
            wait([learners_ready])
        app.wait_ready()

    with ThreadPoolExecutor(3, "start-up") as pool:
        learners_ready = pool.submit(learners.wait_ready)
        pending = {
            learners_ready: "learners",
            pool.submit(wait_for_app): "rollout replicas",
            pool.submit(start_rewards): "reward workers",
        }
        try:
            _report_progress(pending, reporters)
        except BaseException:
            # The other waits end when what they wait for is stopped.
            stopped.set()
            stop_all(("reward workers", rewards.stop), ("rollout replicas", app.stop), ("learners", learners.stop))
            raise


def _report_progress(pending: dict[Any, str], reporters: ReporterSet) -> None:
    while pending:
        reporters.phase("starting " + ", ".join(sorted(pending.values())))
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            pending.pop(future)
            future.result()


def _learner_group(
    settings: Settings, inputs: Inputs, run_id: str, run_dir: RunDirectory, session: RaySession
) -> LearnerGroup:
    learners = settings.learners
    return LearnerGroup(
        spec=learner_spec(settings, inputs, session),
        run_id=run_id,
        num_learners=learners.num_learners,
        num_cpus=session.shares.learner,
        # Ray Train's own bookkeeping; hidden, since nothing in it is for the user.
        storage_path=str(run_dir.path / ".ray_train"),
        startup_timeout_s=learners.startup_timeout_s,
        update_timeout_s=learners.update_timeout_s,
        max_restarts=settings.fault_tolerance.max_learner_restarts,
        state_interval=settings.fault_tolerance.state_interval if settings.fault_tolerance.keeps_state else 0,
        tensor_parallel_size=settings.rollouts.tensor_parallel_size,
        num_replicas=settings.rollouts.num_replicas,
    )


def learner_spec(settings: Settings, inputs: Inputs, session: RaySession) -> LearnerSpec:
    """What the learners need of the settings."""
    learners, model = settings.learners, settings.model
    dtype, schedule = _dtype(settings, session), Schedule.of(settings)
    check_attention_device(model.attn_implementation, on_gpu=session.learners_on_gpu, dtype=dtype)
    return LearnerSpec(
        training=settings.training,
        policy_path=inputs.policy_path,
        advantage=_portable(inputs.advantage),
        loss=_portable(inputs.loss),
        critic_path=inputs.critic_path,
        lora=LoraSpec(
            rank=model.lora_rank,
            alpha=model.lora_alpha,
            targets=tuple(model.lora_targets),
            seed=settings.debugging.seed,
        )
        if model.lora_rank > 0
        else None,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        gradient_checkpointing=learners.gradient_checkpointing,
        compile_backend=learners.compile_backend,
        offload_reference=learners.offload_reference,
        offload_optimizer=learners.offload_optimizer,
        dtype=dtype,
        wire_dtype=dtype,
        temperature=settings.rollouts.temperature,
        max_new_tokens=settings.rollouts.max_new_tokens,
        max_staleness=settings.rollouts.max_staleness,
        total_steps=schedule.total_optimizer_steps,
        policy_steps=schedule.policy_optimizer_steps,
        on_gpu=session.learners_on_gpu,
        timeline=settings.reporting.timeline_interval > 0,
        keeps_state=settings.fault_tolerance.keeps_state,
        num_threads=learners.num_threads,
        weight_transfer=_weight_transfer(settings, session),
        quantized_sampler=settings.rollouts.quantized_by is not None,
        sequence_parallel=learners.sequence_parallel,
        colocated=session.colocated,
    )


def _rollout_app(settings: Settings, inputs: Inputs, run_id: str, bridge: Any, session: RaySession) -> RolloutApp:
    rollouts = settings.rollouts
    spec = engine_spec(
        settings.model,
        rollouts,
        settings.evaluation,
        model_path=inputs.policy_path,
        tokenizer_path=inputs.tokenizer_path,
        config=inputs.model_config,
        eos_token_ids=inputs.eos_token_ids,
        prompt_tokens=inputs.max_prompt_tokens,
        groups_in_flight=max_concurrent_groups(settings),
        seed=settings.debugging.seed,
        on_gpu=session.on_gpu,
        learners_on_gpu=session.learners_on_gpu,
        dtype=_dtype(settings, session),
        colocated=session.colocated,
    )
    return RolloutApp(
        run_id=run_id,
        spec=replace(spec, timeline=settings.reporting.timeline_interval > 0),
        num_replicas=rollouts.num_replicas,
        num_cpus=session.shares.replica,
        bridge=bridge,
        startup_timeout_s=rollouts.startup_timeout_s,
        ray_ends=session.ends_ray,
    )


def _portable(plugin: Plugin) -> Plugin:
    """The plug-in with a function of the user's pickled, code of a lone file or a notebook included."""
    if not callable(plugin.function):
        return plugin
    return replace(plugin, function=pack(plugin.function, defined_by=plugin.function))


def _portable_tokenizer(settings: Settings, inputs: Inputs) -> Any:
    """The tokenizer itself for the reward workers, which saves them the import of most of transformers.

    ``None`` where its class came with the model: that can be imported only from the model's own files.
    """
    tokenizer = load_tokenizer(inputs.tokenizer_path, trust_remote_code=settings.model.trust_remote_code)
    return tokenizer if type(tokenizer).__module__.startswith("transformers.") else None


def _runs_on_cpus(settings: Settings) -> bool:
    """Whether that is certain before Ray is asked."""
    import torch

    resources = settings.resources
    if resources.device != "auto":
        return resources.device == "cpu"
    no_gpus_here = cluster_to_join(resources.ray_address) is None and not torch.cuda.is_available()
    return no_gpus_here or vllm_build() == "cpu"


def _dtype(settings: Settings, session: RaySession) -> str:
    if settings.model.dtype == "auto":
        return "bfloat16" if session.on_gpu else "float32"
    return settings.model.dtype


def _weight_transfer(settings: Settings, session: RaySession) -> str:
    between_gpus = session.on_gpu and session.learners_on_gpu
    setting = settings.rollouts.weight_transfer
    return weight_transfer(setting, between_gpus=between_gpus, colocated=session.colocated)


def _expanded(path: str | None) -> str | None:
    return None if path is None else absolute_if_local(path)


def _first_given(value: int | None, default: int) -> int:
    return default if value is None else value
