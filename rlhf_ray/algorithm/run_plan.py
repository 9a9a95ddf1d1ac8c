"""What replicas and learners of a run are given: computed once, from settings, models and placement.

``start.py`` starts what the plan says, ``rlhf-ray doctor`` computes the same and tries it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from rlhf_ray.algorithm.inputs import Inputs
from rlhf_ray.algorithm.placement import Placement
from rlhf_ray.config.checks import check_attention_device
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.learner.learner import LearnerSpec
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.rewards.shipping import pack
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.rollouts.engine_spec import engine_spec, weight_transfer
from rlhf_ray.types import Device

__all__ = ["RunPlan", "learner_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """All that follows from settings, models and cluster."""

    placement: Placement
    engine: EngineSpec
    learner: LearnerSpec

    @classmethod
    def of(cls, settings: Settings, inputs: Inputs, placement: Placement) -> Self:
        """Plan a run.

        Raises:
            ConfigError: Learners cannot compute the attention on their device, or vLLM cannot run the model there.
        """
        learner = learner_spec(settings, inputs, placement.device)
        engine = engine_spec(
            settings,
            placement.device,
            model_path=inputs.policy_path,
            tokenizer_path=inputs.tokenizer_path,
            config=inputs.model_config,
            eos_token_ids=inputs.eos_token_ids,
            prompt_tokens=inputs.max_prompt_tokens,
        )
        return cls(placement=placement, engine=engine, learner=learner)


def learner_spec(settings: Settings, inputs: Inputs, device: Device) -> LearnerSpec:
    """What the learners need of the settings.

    Raises:
        ConfigError: The attention has no kernel on their device, or weights cannot be sent as asked for.
    """
    learners, model, rollouts, schedule = settings.learners, settings.model, settings.rollouts, Schedule.of(settings)
    on_gpu = device.learners_on_gpu
    check_attention_device(model.attn_implementation, on_gpu=on_gpu, dtype=device.dtype)
    lora = LoraSpec(
        rank=model.lora_rank, alpha=model.lora_alpha, targets=tuple(model.lora_targets), seed=settings.debugging.seed
    )
    return LearnerSpec(
        training=settings.training,
        policy_path=inputs.policy_path,
        advantage=_portable(inputs.advantage),
        loss=_portable(inputs.loss),
        critic_path=inputs.critic_path,
        lora=lora if model.lora_rank > 0 else None,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        gradient_checkpointing=learners.gradient_checkpointing,
        compile_backend=learners.compile_backend,
        offload_reference=learners.offload_reference,
        offload_optimizer=learners.offload_optimizer,
        dtype=device.dtype,
        wire_dtype=device.dtype,
        temperature=rollouts.temperature,
        max_new_tokens=rollouts.max_new_tokens,
        max_staleness=rollouts.max_staleness,
        total_steps=schedule.total_optimizer_steps,
        policy_steps=schedule.policy_optimizer_steps,
        on_gpu=on_gpu,
        timeline=settings.reporting.timeline_interval > 0,
        keeps_state=settings.fault_tolerance.keeps_state,
        num_threads=learners.num_threads,
        weight_transfer=weight_transfer(rollouts.weight_transfer, device),
        quantized_sampler=rollouts.quantized_by is not None,
        sequence_parallel=learners.sequence_parallel,
        colocated=device.colocated,
    )


def _portable(plugin: Plugin) -> Plugin:
    """The plug-in with a function of the user's pickled, code of a lone file or a notebook included."""
    if not callable(plugin.function):
        return plugin
    return replace(plugin, function=pack(plugin.function, defined_by=plugin.function))
