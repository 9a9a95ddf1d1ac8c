"""What a run reads and checks before anything is started: models, tokenizer, reward functions and datasets.

Cheap checks come first: what can be wrong with names, files and models is found in seconds, before any engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithm.ray_connection import cluster_to_join
from rlhf_ray.config.checks import check_advantage, check_loss
from rlhf_ray.config.held_out_sets import held_out_sets
from rlhf_ray.config.local_path import absolute_if_local
from rlhf_ray.config.plugins import Plugin, advantage_plugin, loss_plugin
from rlhf_ray.config.settings import DataSettings, Settings
from rlhf_ray.environments.dialogue import ChatFormat
from rlhf_ray.environments.registry import NamedEnvironment, resolve_environments
from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.models import check_compile_backend
from rlhf_ray.models.config import (
    check_causal,
    check_reads_vocabulary,
    check_sequence_parallel,
    check_vocabulary,
    load_model_config,
)
from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.prompts.tokenizer import load_tokenizer, read_chat_template
from rlhf_ray.rewards.functions import resolve_rewards, rewards_of_run, row_check
from rlhf_ray.rewards.reward_model.check import check_reward_model
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.rollouts.engine_spec import (
    check_quantization,
    check_served,
    eos_token_ids,
    max_prompt_tokens,
    vllm_build,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["Inputs", "check_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was read and checked before anything was started."""

    policy_path: str
    critic_path: str | None
    """``None``: the advantage needs no critic."""
    reference_path: str | None
    """``None``: the reference is the policy as the run begins with it."""
    advantage: Plugin
    loss: Plugin
    environments: tuple[NamedEnvironment, ...]
    """None: a completion is all."""
    tokenizer_path: str
    model_config: PretrainedConfig
    eos_token_ids: tuple[int, ...]
    """What ends a completion, in addition to ``rollouts.stop_token_ids``."""
    max_prompt_tokens: int
    vocabulary_size: int
    """Tokens that the policy has an embedding for."""
    prompts: PromptStream
    held_out: dict[str, PromptStream]
    """Name of a held-out set -> its prompts, once each and in order."""


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
    reference_path = _expanded(settings.model.reference_path)
    trust = settings.model.trust_remote_code
    rewards = resolve_rewards(rewards_of_run(settings))
    environments = resolve_environments(settings.environment)
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
        check_reads_vocabulary("model.critic_path", critic_path, critic, tokenizer, config)
        check_sequence_parallel(settings.learners.sequence_parallel, "model.critic_path", critic)
    if reference_path is not None:
        reference = load_model_config("model.reference_path", reference_path, trust_remote_code=trust)
        check_causal("model.reference_path", reference_path, reference)
        check_reads_vocabulary("model.reference_path", reference_path, reference, tokenizer, config)
        check_sequence_parallel(settings.learners.sequence_parallel, "model.reference_path", reference)
    stops = settings.rollouts.stop_token_ids
    eos = eos_token_ids(policy_path, config, tokenizer, stop_token_ids=stops)
    prompt_tokens = max_prompt_tokens(settings.rollouts, settings.evaluation, config)
    tools = tuple(schema for one in environments for schema in one.tools)
    _check_environment(settings, tokenizer, tools)
    vocabulary_size = check_vocabulary(tokenizer, config)

    def stream(data: DataSettings, **given: Any) -> PromptStream:
        return PromptStream(
            data,
            tokenizer_path=tokenizer_path,
            max_prompt_tokens=prompt_tokens,
            vocabulary_size=vocabulary_size,
            trust_remote_code=trust,
            tools=tools,
            **given,
        )

    prompts = stream(settings.data, seed=settings.debugging.seed)
    check_row = row_check(rewards)
    # A stop string may be the end of a turn; only token ids can be compared.
    prompts.check(check_row, stop_token_ids=None if settings.rollouts.stop else {*eos, *stops})
    held_out = {one.name: stream(one.data, field=one.field, epochs=1) for one in held_out_sets(settings.data)}
    for held_out_prompts in held_out.values():
        held_out_prompts.check(check_row)
    return Inputs(
        policy_path=policy_path,
        critic_path=(critic_path or policy_path) if advantage.needs_critic else None,
        reference_path=reference_path,
        advantage=advantage,
        loss=loss,
        environments=environments,
        tokenizer_path=tokenizer_path,
        model_config=config,
        eos_token_ids=eos,
        max_prompt_tokens=prompt_tokens,
        vocabulary_size=vocabulary_size,
        prompts=prompts,
        held_out=held_out,
    )


def _check_environment(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]
) -> None:
    """Check what the tokenizer's chat template must be able to do.

    Raises:
        ConfigError: There is no chat template where messages are needed, or it has no place for tools.
    """
    environment = settings.environment
    if not tools and environment.agent is None:
        return
    template = read_chat_template(settings.data.chat_template) or tokenizer.chat_template
    if isinstance(template, dict):  # A template of its own for tools.
        template = tokenizer.get_chat_template(tools=list(tools) or None)
    kind = "tools" if tools else "agent"
    names = [tool["function"]["name"] for tool in tools] if tools else str(environment.agent)
    if template is None:
        remedy = "messages need a chat template, and the tokenizer has none; name a chat model, or data.chat_template"
        raise ConfigError(f"environment.{kind}", names, remedy)
    if tools:
        arguments = settings.data.chat_template_kwargs
        ChatFormat(
            tokenizer, template=read_chat_template(settings.data.chat_template), arguments=arguments
        ).check_tools(tools)


def _runs_on_cpus(settings: Settings) -> bool:
    """Whether that is certain before Ray is asked."""
    import torch

    resources = settings.resources
    if resources.device != "auto":
        return resources.device == "cpu"
    no_gpus_here = cluster_to_join(resources.ray_address) is None and not torch.cuda.is_available()
    return no_gpus_here or vllm_build() == "cpu"


def _expanded(path: str | None) -> str | None:
    return None if path is None else absolute_if_local(path)
