"""Before the loop: settings that cannot go together in ``training``, and with the loss and the advantage it names."""

from __future__ import annotations

from rlhf_ray.config.plugins import Plugin, advantage_plugin, loss_plugin
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError

__all__ = [
    "check_advantage",
    "check_critic_warmup",
    "check_kl_clip",
    "check_kl_target",
    "check_loss",
    "check_lr_warmup",
    "check_microbatch_fits",
    "check_minibatches",
    "check_plugins",
]


def check_minibatches(settings: Settings) -> None:
    """No minibatch is empty."""
    completions = Schedule.of(settings).completions
    if settings.training.num_minibatches > completions:
        remedy = f"use at most {completions}, the completions an iteration (data.batch_size x rollouts.group_size)"
        raise ConfigError("training.num_minibatches", settings.training.num_minibatches, remedy)


def check_microbatch_fits(settings: Settings) -> None:
    """The longest sequence fits a microbatch."""
    longest = (settings.rollouts.max_prompt_tokens or 1) + settings.rollouts.max_new_tokens
    budget, size = settings.learners.max_tokens_per_microbatch, settings.learners.sequence_parallel
    if budget * size < longest:
        shared = f", shared by learners.sequence_parallel = {size} learners" if size > 1 else ""
        remedy = (
            f"a sequence would not fit; use at least {-(-longest // size)} (the longest prompt and the longest "
            f"completion{shared})"
        )
        raise ConfigError("learners.max_tokens_per_microbatch", budget, remedy)


def check_plugins(settings: Settings) -> None:
    """Loss and advantage are there, and use what is set for them."""
    training = settings.training
    # Functions in files and modules are resolved when the run starts: some take seconds to import.
    if ":" not in training.loss:
        check_loss(loss_plugin(training.loss, training.loss_args), settings)
    if ":" not in training.advantage:
        check_advantage(advantage_plugin(training.advantage, training.advantage_args), settings)


def check_loss(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the loss would ignore.

    Raises:
        ConfigError: A dual clip is given to a loss that has none, or another policy than the trained one may sample and
            the loss cannot correct for it.
    """
    training, rollouts = settings.training, settings.rollouts
    corrects = training.behavior_weights == "none" or "behavior_weights" in plugin.asks_for
    if rollouts.is_off_policy and not corrects:
        sampler, without = "stale data", "use rollouts.max_staleness=0"
        field, value = "rollouts.max_staleness", rollouts.max_staleness
        if rollouts.quantized_by is not None and rollouts.max_staleness == 0:
            sampler, without = "what a quantized engine samples", "leave it out"
            field, value = rollouts.quantized_by
        remedy = (
            f"the loss {plugin.name} has no parameter behavior_weights, so it would not correct {sampler}; add it, or "
            f"{without}, or say training.behavior_weights='none'"
        )
        raise ConfigError(field, value, remedy)
    dual_clip = settings.training.dual_clip
    if dual_clip is not None and "dual_clip" not in plugin.asks_for:
        raise ConfigError("training.dual_clip", dual_clip, f"the loss {plugin.name} has no dual clip; leave it out")


def check_advantage(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the advantage cannot work with.

    Raises:
        ConfigError: It compares completions and there is one a prompt; rewards become what it cannot take; or a
            setting of the critic is given to a run that has none.
    """
    training, size = settings.training, settings.rollouts.group_size
    normalize = settings.rewards.normalize
    if normalize != "none" and plugin.needs_greedy_rewards:
        remedy = f"{plugin.name} compares with the reward of a greedy completion, which is not normalized; use none"
        raise ConfigError("rewards.normalize", normalize, remedy)
    if plugin.name == "maxrl" and normalize != "none":
        remedy = "maxrl takes rewards of 0 or more, which normalized ones are not; use none"
        raise ConfigError("rewards.normalize", normalize, remedy)
    if plugin.name == "maxrl" and training.kl_coef > 0 and training.kl_in == "reward":
        remedy = "maxrl takes rewards of 0 or more, which a KL taken off them may break; use loss"
        raise ConfigError("training.kl_in", training.kl_in, remedy)
    if plugin.compares_groups and size < 2:
        remedy = f"{plugin.name} compares the completions of a prompt; use at least 2"
        raise ConfigError("rollouts.group_size", size, remedy)
    if plugin.needs_critic:
        return
    if settings.model.critic_path is not None:
        remedy = f"{plugin.name} has no critic; leave it out, or set training.advantage to gae"
        raise ConfigError("model.critic_path", settings.model.critic_path, remedy)
    if training.critic_warmup_iterations:
        remedy = f"{plugin.name} has no critic to warm up; use 0"
        raise ConfigError("training.critic_warmup_iterations", training.critic_warmup_iterations, remedy)


def check_kl_target(settings: Settings) -> None:
    """An adaptive KL coefficient starts somewhere and moves in small steps."""
    training = settings.training
    if training.kl_target is None:
        return
    if training.kl_coef == 0:
        raise ConfigError("training.kl_target", training.kl_target, "give training.kl_coef, where the adapting starts")
    completions = Schedule.of(settings).completions
    if completions >= 5 * training.kl_horizon:
        remedy = f"use more than {completions // 5}, a fifth of the completions an iteration"
        raise ConfigError("training.kl_horizon", training.kl_horizon, remedy)


def check_kl_clip(settings: Settings) -> None:
    """The cap of the KL has a KL in the reward to act on."""
    training = settings.training
    if training.kl_clip is not None and (training.kl_coef == 0 or training.kl_in != "reward"):
        remedy = "it bounds the KL in the reward; give training.kl_coef with training.kl_in=reward, or leave it out"
        raise ConfigError("training.kl_clip", training.kl_clip, remedy)


def check_critic_warmup(settings: Settings) -> None:
    """The policy is updated before the run ends."""
    warmup, iterations = settings.training.critic_warmup_iterations, settings.training.iterations
    if warmup >= iterations:
        remedy = f"the policy would never be updated; use less than training.iterations ({iterations})"
        raise ConfigError("training.critic_warmup_iterations", warmup, remedy)


def check_lr_warmup(settings: Settings) -> None:
    """The learning rate is reached before the run ends."""
    warmup, steps = settings.training.lr_warmup_steps, Schedule.of(settings).policy_optimizer_steps
    if warmup > steps:
        remedy = f"use at most {steps}, all the optimizer steps of the policy"
        raise ConfigError("training.lr_warmup_steps", warmup, remedy)
