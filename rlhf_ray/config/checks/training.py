"""Combinations that cannot work in ``rollouts`` and ``training``, and with the loss and the advantage named there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from rlhf_ray.config.plugins import Plugin, advantage_plugin, loss_plugin
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings

__all__ = ["COMBINATIONS", "advantage_problems", "loss_problems"]

_FIXED_ENGINE_ARGS: Final[Mapping[str, str]] = {
    "model": "set model.path",
    "tokenizer": "set model.tokenizer_path",
    "dtype": "set model.dtype",
    "trust_remote_code": "set model.trust_remote_code",
    "tensor_parallel_size": "set rollouts.tensor_parallel_size",
    "data_parallel_size": "set rollouts.num_replicas",
    "gpu_memory_utilization": "set rollouts.gpu_memory_utilization",
    "kv_cache_memory_bytes": "set rollouts.kv_cache_bytes",
    "enforce_eager": "set rollouts.enforce_eager",
    "enable_sleep_mode": "set resources.colocate",
    "max_model_len": "set rollouts.max_prompt_tokens and rollouts.max_new_tokens, which it follows from",
    "seed": "set debugging.seed, which the seed of every completion follows from",
    "weight_transfer_config": "set rollouts.weight_transfer",
    "quantization": "set rollouts.quantization",
    "worker_extension_cls": "leave it out; the weight transfer needs it",
    "logprobs_mode": "leave it out; the learner needs the log-probabilities of the distribution sampled from",
    "skip_tokenizer_init": "leave it out; prompts and completions are token ids already",
}


def sampling_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Training samples from the full distribution, and engine arguments leave alone what other settings decide."""
    why = "the learner recomputes log-probabilities over the full distribution"
    if settings.rollouts.top_p != 1.0:
        yield "rollouts.top_p", f"training needs 1.0: {why}"
    if settings.rollouts.top_k != 0:
        yield "rollouts.top_k", f"training needs 0: {why}"
    for name in settings.rollouts.engine_args:
        if name in _FIXED_ENGINE_ARGS:
            yield f"rollouts.engine_args.{name}", _FIXED_ENGINE_ARGS[name]


def off_policy_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """What corrects or masks data of another policy has such data, and the forward pass it needs."""
    training, rollouts, quantized_by = settings.training, settings.rollouts, settings.rollouts.quantized_by
    if rollouts.partial_rollouts and rollouts.max_staleness == 0:
        yield (
            "rollouts.partial_rollouts",
            "with rollouts.max_staleness=0 nothing that is carried over may be trained on; set it to 1 or more",
        )
    if training.proximal == "loglinear":
        if training.kl_coef > 0 and training.kl_in == "reward":
            yield (
                "training.proximal",
                "a KL in the reward needs the forward pass that this saves; use recompute, or kl_in='loss'",
            )
        if training.m2po_threshold is not None:
            yield "training.proximal", "m2po_threshold needs the forward pass that this saves; use recompute"
        if quantized_by is not None:
            yield (
                "training.proximal",
                f"it takes the sampling policy for an earlier version; with {quantized_by[0]} it is not; use recompute",
            )
    if training.m2po_threshold is not None and not rollouts.is_off_policy:
        yield (
            "training.m2po_threshold",
            "it masks stale data, and with rollouts.max_staleness=0 there is none; leave it out",
        )


def batch_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """No minibatch is empty, and the longest sequence fits a microbatch."""
    completions = Schedule(settings).completions
    if settings.training.num_minibatches > completions:
        yield (
            "training.num_minibatches",
            f"use at most {completions}, the completions per iteration (data.batch_size x rollouts.group_size)",
        )
    longest = (settings.rollouts.max_prompt_tokens or 1) + settings.rollouts.max_new_tokens
    size = settings.learners.sequence_parallel
    if settings.learners.max_tokens_per_microbatch * size < longest:
        shared = f", shared by learners.sequence_parallel = {size} learners" if size > 1 else ""
        yield (
            "learners.max_tokens_per_microbatch",
            f"a sequence would not fit; use at least {-(-longest // size)} (the longest prompt and the longest "
            f"completion{shared})",
        )


def plugin_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Loss and advantage exist, and use what is set for them."""
    training = settings.training
    # Functions in files and modules are resolved when the run starts: some take seconds to import.
    if ":" not in training.loss:
        yield from loss_problems(loss_plugin(training.loss, training.loss_args), settings)
    if ":" not in training.advantage:
        yield from advantage_problems(advantage_plugin(training.advantage, training.advantage_args), settings)
    if settings.rollouts.dynamic_sampling and settings.rollouts.group_size < 2:
        yield (
            "rollouts.group_size",
            "rollouts.dynamic_sampling compares the rewards of a group, and one is always equal; use at least 2",
        )


def loss_problems(plugin: Plugin, settings: Settings) -> Iterator[tuple[str, str]]:
    """The loss ignores no setting."""
    training, rollouts = settings.training, settings.rollouts
    corrects = training.behavior_weights == "none" or "behavior_weights" in plugin.required_inputs
    if rollouts.is_off_policy and not corrects:
        sampler, without, field = "stale data", "use rollouts.max_staleness=0", "rollouts.max_staleness"
        if rollouts.quantized_by is not None and rollouts.max_staleness == 0:
            sampler, without, field = "what a quantized engine samples", "leave it out", rollouts.quantized_by[0]
        yield (
            field,
            f"the loss {plugin.name} has no parameter behavior_weights, so it would not correct {sampler}; add it, or "
            f"{without}, or say training.behavior_weights='none'",
        )
    if training.dual_clip is not None and "dual_clip" not in plugin.required_inputs:
        yield "training.dual_clip", f"the loss {plugin.name} has no dual clip; leave it out"


def advantage_problems(plugin: Plugin, settings: Settings) -> Iterator[tuple[str, str]]:
    """The advantage has what it compares, takes the rewards that there are, and there is a critic where one is set."""
    training, is_normalized = settings.training, settings.rewards.normalize != "none"
    if is_normalized and plugin.needs_greedy_rewards:
        yield (
            "rewards.normalize",
            f"{plugin.name} compares with the reward of a greedy completion, which is not normalized; use none",
        )
    if plugin.name == "maxrl" and is_normalized:
        yield "rewards.normalize", "maxrl takes rewards of 0 or more, which normalized ones are not; use none"
    if plugin.name == "maxrl" and training.kl_coef > 0 and training.kl_in == "reward":
        yield "training.kl_in", "maxrl takes rewards of 0 or more, which a KL taken off them may break; use loss"
    if plugin.compares_groups and settings.rollouts.group_size < 2:
        yield "rollouts.group_size", f"{plugin.name} compares the completions of a prompt; use at least 2"
    for name, argument in (("critic_lambda", "critic_lam"), ("lambda_alpha", "length_alpha")):
        if getattr(training, name) is not None and argument not in plugin.required_inputs:
            yield f"training.{name}", f"the advantage {plugin.name} has no parameter {argument}; leave it out"
    if not plugin.needs_critic and settings.model.critic_path is not None:
        yield "model.critic_path", f"{plugin.name} has no critic; leave it out, or set training.advantage to gae"
    if not plugin.needs_critic and training.critic_warmup_iterations:
        yield "training.critic_warmup_iterations", f"{plugin.name} has no critic to warm up; use 0"
    for name in ("critic_epochs", "critic_num_minibatches", "critic_warmup_explained_variance", "value_bins"):
        if not plugin.needs_critic and getattr(training, name) is not None:
            yield f"training.{name}", f"{plugin.name} has no critic; leave it out"


def schedule_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is adapted starts somewhere and moves in small steps, and warm-ups end before the run does."""
    training, schedule = settings.training, Schedule(settings)
    if settings.model.reference_path is not None and training.kl_coef == 0:
        yield "model.reference_path", "nothing is kept near it: set training.kl_coef above 0, or leave it out"
    if training.kl_target is not None and training.kl_coef == 0:
        yield "training.kl_target", "give training.kl_coef, where the adapting starts"
    if training.kl_target is not None and schedule.completions >= 5 * training.kl_horizon:
        fifth = schedule.completions // 5
        yield "training.kl_horizon", f"use more than {fifth}, a fifth of the completions per iteration"
    if training.kl_clip is not None and (training.kl_coef == 0 or training.kl_in != "reward"):
        yield (
            "training.kl_clip",
            "it bounds the KL in the reward; give training.kl_coef with training.kl_in=reward, or leave it out",
        )
    if training.value_bins is not None:
        reason = "the cross-entropy of value_bins has none"
        if training.value_clip is not None:
            yield "training.value_clip", f"{reason}; set it to null"
        if training.value_huber is not None:
            yield "training.value_huber", f"{reason}; leave it out"
        if training.value_init != "zero":
            yield "training.value_init", "value_bins begin with the middle of value_range; use zero"
        if settings.learners.sequence_parallel > 1:
            yield "training.value_bins", "learners that read slices of sequences exchange one number per token; use 1"
    if not training.value_range[0] < training.value_range[1]:
        yield "training.value_range", "give the smallest return and then a larger one"
    if training.critic_num_minibatches and training.num_minibatches % training.critic_num_minibatches:
        yield (
            "training.critic_num_minibatches",
            f"the critic's minibatches are several of the policy's: use a divisor of training.num_minibatches = "
            f"{training.num_minibatches}",
        )
    if training.critic_warmup_explained_variance is not None and training.critic_warmup_iterations == 0:
        yield (
            "training.critic_warmup_explained_variance",
            "there is no warm-up to end; set training.critic_warmup_iterations, the most that it may take",
        )
    if training.critic_warmup_iterations >= training.iterations:
        yield (
            "training.critic_warmup_iterations",
            f"the policy would never be updated; use less than training.iterations ({training.iterations})",
        )
    if training.lr_warmup_steps > schedule.policy_optimizer_steps:
        steps = schedule.policy_optimizer_steps
        yield "training.lr_warmup_steps", f"use at most {steps}, all the optimizer steps of the policy"


COMBINATIONS = (sampling_problems, off_policy_problems, batch_problems, plugin_problems, schedule_problems)
