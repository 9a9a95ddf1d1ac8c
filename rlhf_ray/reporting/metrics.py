"""What every number in a result means, and results as flat rows.

A result is a nested dictionary; reporters write it flat, keys joined by ``/``. Every key that the library puts there
is declared here once. ``<name>`` in a key stands for any text.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlhf_ray.config import nested

__all__ = [
    "METRICS",
    "Metric",
    "Scalar",
    "environment_name",
    "finite",
    "flatten",
    "held_out_set",
    "metric_for",
    "number",
]

Scalar: TypeAlias = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of a result."""

    key: str
    """Joined by ``/``; ``<name>`` stands for any text."""
    unit: str
    formula: str
    """How the number comes about, in one line."""

    def match(self, key: str) -> re.Match[str] | None:
        """Whether a flat key is this one; the texts for the names in it are the groups of the match."""
        return _pattern(self.key).fullmatch(key)


METRICS: tuple[Metric, ...] = (
    Metric("training_iteration", "iterations", "iterations finished since the run began, restarts included"),
    Metric("time_this_iter_s", "s", "wall time of this call of train()"),
    Metric("time_total_s", "s", "sum of time_this_iter_s since the run began"),
    Metric("timestamp", "s", "Unix time at the end of the iteration"),
    # What was sampled.
    Metric("rollouts/num_groups", "groups", "scored groups handed to the learner"),
    Metric("rollouts/num_completions", "completions", "completions in those groups; one of several turns counts once"),
    Metric("rollouts/reward_mean", "reward", "mean over completions of the weighted sum over reward functions"),
    Metric("rollouts/reward_std", "reward", "standard deviation over completions of the same sum"),
    Metric("rollouts/prompt_tokens_mean", "tokens", "mean prompt length over groups"),
    Metric("rollouts/completion_tokens_mean", "tokens", "mean sampled tokens of a completion, EOS included"),
    Metric("rollouts/completion_tokens_max", "tokens", "most sampled tokens of a completion, EOS included"),
    Metric(
        "rollouts/truncated_fraction",
        "fraction",
        "completions whose finish_reason is length, turns or environment / completions",
    ),
    Metric("rollouts/turns_mean", "turns", "mean number of turns of a completion, 1 without an environment"),
    Metric(
        "rollouts/observed_tokens_mean",
        "tokens",
        "mean tokens of a completion that an environment wrote; neither prompt nor sampled",
    ),
    Metric(
        "rollouts/tokens_per_s",
        "tokens/s",
        "completion tokens written since the last batch / the time of it with a group at the replicas",
    ),
    Metric(
        "rollouts/idle_fraction", "fraction", "time since the last batch without any group at the replicas / that time"
    ),
    Metric(
        "rollouts/in_loss_fraction",
        "fraction",
        "completion tokens that enter the losses / completion tokens; left out are those of truncated completions "
        "(training.mask_truncated) and those that became too stale (rollouts.partial_rollouts)",
    ),
    Metric(
        "rollouts/staleness_fraction/<versions>",
        "fraction",
        "tokens sampled by the policy that many versions before the one that is trained / tokens, both in the losses",
    ),
    Metric(
        "rollouts/staleness_mean",
        "versions",
        "mean of the policy version minus the sampling version over tokens in the losses",
    ),
    Metric(
        "rollouts/staleness_max",
        "versions",
        "largest policy version minus sampling version over tokens in the losses",
    ),
    Metric(
        "rollouts/dropped_prompts", "prompts", "prompts left out since the run began, longer than max_prompt_tokens"
    ),
    Metric(
        "rollouts/carried_groups",
        "groups",
        "groups that the batch did not wait for in the last version of their bound (rollouts.partial_rollouts)",
    ),
    Metric(
        "rollouts/equal_reward_groups",
        "groups",
        "groups of equal rewards dropped and replaced in this iteration (rollouts.dynamic_sampling)",
    ),
    # What the reward functions said.
    Metric("rewards/<function>/mean", "reward", "mean of one function, unweighted, where it did not answer None"),
    Metric(
        "rewards/failures/<kind>", "groups", "groups dropped and replaced in this iteration because a reward failed so"
    ),
    Metric("rewards/<function>/<metric>", "any", "mean over its calls of what the function gave to log_metric"),
    # What the environments said. The first two are of the batch, the others of all that was played since the last one.
    Metric(
        "environment/<name>/reward_mean",
        "reward",
        "mean over completions of the sum of the rewards that the environment gave in all turns, unweighted",
    ),
    Metric("environment/<name>/steps_mean", "turns", "mean number of turns of the environment's completions"),
    Metric("environment/<name>/step_s", "s", "time that the environment took for its steps / steps"),
    Metric(
        "environment/<name>/failures/<kind>",
        "groups",
        "groups dropped and replaced in this iteration because the environment failed so",
    ),
    Metric("environment/<name>/<metric>", "any", "mean over the steps that reported it in Step.metrics"),
    # The update; token means are over completion tokens of all optimizer steps of the iteration.
    Metric("learner/policy_loss", "loss", "policy loss (training.loss) over its global denominator"),
    Metric(
        "learner/value_loss",
        "reward^2",
        "half the squared error of the critic, clipped by value_clip, linear beyond value_huber; with value_bins its "
        "cross-entropy, in nats",
    ),
    Metric(
        "learner/nll_loss",
        "nats",
        "mean negative log-likelihood of the tokens of successful trajectories (training.nll_coef)",
    ),
    Metric("learner/entropy", "nats", "token mean of the entropy of the policy at the sampling temperature"),
    Metric("learner/approx_kl", "nats", "token mean of r - 1 - log r, r = current / proximal policy (k3 estimator)"),
    Metric(
        "learner/clip_fraction",
        "fraction",
        "tokens whose ratio lies beyond the bound that its advantage makes active / tokens",
    ),
    Metric("learner/clip_fraction_low", "fraction", "the part of clip_fraction at the lower bound (clip_low)"),
    Metric("learner/clip_fraction_high", "fraction", "the part of clip_fraction at the upper bound (clip_high)"),
    Metric("learner/ratio_mean", "ratio", "token mean of the current / proximal ratio (gspo: that of its sequence)"),
    Metric("learner/ratio_max", "ratio", "largest current / proximal ratio of a token (gspo: of a sequence)"),
    Metric("learner/gate_mean", "fraction", "token mean of SAPO's gate (arXiv:2511.20347), 1 where nothing fades"),
    Metric("learner/grad_norm", "norm", "gradient norm of the policy before the clip, mean over optimizer steps"),
    Metric(
        "learner/critic_grad_norm", "norm", "gradient norm of the critic before the clip, mean over optimizer steps"
    ),
    Metric(
        "learner/skipped_updates",
        "steps",
        "optimizer steps left out because a number was not finite (training.nonfinite_updates = skip)",
    ),
    Metric("learner/value_clip_fraction", "fraction", "tokens whose value the value clip holds / tokens"),
    Metric("learner/explained_variance", "fraction", "1 - var(return - value) / var(return); 1 is a perfect critic"),
    Metric("learner/value_mean", "reward", "token mean of the critic's values during the update"),
    Metric("learner/return_mean", "reward", "token mean of advantage + value"),
    Metric("learner/advantage_mean", "reward", "token mean of the advantage (training.advantage), before whitening"),
    Metric("learner/advantage_std", "reward", "standard deviation over tokens of the same advantage"),
    Metric(
        "learner/kl_to_reference",
        "nats",
        "token mean of kl_estimator, policy against the frozen reference, before training.kl_clip",
    ),
    Metric("learner/kl_clip_fraction", "fraction", "tokens whose KL estimate is beyond training.kl_clip / tokens"),
    Metric("learner/kl_coef", "reward/nat", "weight of the KL to the reference in this update (fixed or adapted)"),
    Metric(
        "learner/behavior_weight_mean",
        "ratio",
        "token mean of the weight of stale data, or of a quantized engine's, proximal / sampling within its bounds",
    ),
    Metric("learner/behavior_ratio_max", "ratio", "largest proximal / sampling ratio, before the bounds"),
    Metric("learner/behavior_clip_fraction", "fraction", "tokens whose ratio lies outside the bounds / tokens"),
    Metric("learner/m2po_masked_fraction", "fraction", "tokens that training.m2po_threshold leaves out / tokens"),
    Metric("learner/effective_sample_size", "fraction", "(sum w)^2 / (n sum w^2) of the weights w of the n tokens"),
    Metric(
        "learner/proximal_logprob_diff_by_staleness/<versions>",
        "nats",
        "mean of |log p(proximal) - log p(sampling)| over the tokens sampled that many versions before",
    ),
    Metric("learner/lr", "1/step", "learning rate of the policy at the last optimizer step"),
    Metric("learner/critic_lr", "1/step", "learning rate of the critic at the last optimizer step"),
    # The three below are taken at the first optimizer step; the first two where learner and engine hold one version.
    Metric(
        "learner/sampling_logprob_diff_mean",
        "nats",
        "mean of |log p(learner) - log p(engine)| over completions without a stale token",
    ),
    Metric(
        "learner/sampling_logprob_diff_max",
        "nats",
        "largest |log p(learner) - log p(engine)| of a token of such a completion",
    ),
    Metric(
        "learner/first_ratio_deviation_max",
        "ratio",
        "largest |current / proximal - 1| of a token, 0 if exact; only with a KL in the reward: without, both are one "
        "forward pass's",
    ),
    Metric("learner/num_tokens", "tokens", "prompt and completion tokens of the batch, one pass, all learners"),
    Metric("learner/num_microbatches", "microbatches", "microbatches in one pass over the batch, first learner"),
    Metric("learner/padding_fraction", "fraction", "padding / (padding + tokens) in the microbatches"),
    Metric("learner/idle_fraction", "fraction", "1 - (timers/advantage_s + timers/update_s) / timers/iteration_s"),
    Metric("learner/tokens_per_s", "tokens/s", "learner/num_tokens / (timers/advantage_s + timers/update_s)"),
    Metric("learner/policy_version", "versions", "updates applied since the run began, and one more for each rewind"),
    # Where the time went.
    Metric("timers/rollout_s", "s", "from asking for groups until the last completion of the batch arrived"),
    Metric("timers/reward_s", "s", "from the last completion until the last reward: what rewards add to the rollout"),
    Metric("timers/advantage_s", "s", "recomputed log-probabilities, values and advantages"),
    Metric("timers/update_s", "s", "forward, backward and optimizer steps"),
    Metric("timers/weight_sync_s", "s", "how long weight sync holds training up"),
    Metric("timers/iteration_s", "s", "the whole training step"),
    Metric("weight_sync/size_bytes", "bytes", "weights published to each replica"),
    Metric("weight_sync/num_replicas", "replicas", "replicas that acknowledged the new version"),
    Metric("weight_sync/publication_s", "s", "from the end of an update until every replica serves its policy"),
    Metric("weight_sync/pause_s", "s", "longest time for which a replica was paused to load them"),
    # What was measured on held-out prompts.
    Metric(
        "evaluation/<dataset>/reward_mean",
        "reward",
        "mean over prompts of the mean reward of their evaluation.samples_per_prompt completions (avg@k)",
    ),
    Metric(
        "evaluation/<dataset>/reward_stderr",
        "reward",
        "standard error of reward_mean: unbiased standard deviation of the prompts' means / sqrt(prompts)",
    ),
    Metric(
        "evaluation/<dataset>/pass_at_<k>",
        "fraction",
        "mean over prompts of 1 - C(n - c, k) / C(n, k), c of the n completions passing (arXiv:2107.03374); a reward "
        "of at least evaluation.pass_threshold passes",
    ),
    Metric(
        "evaluation/<dataset>/rewards/<function>/<metric>",
        "any",
        "mean over its calls of what the function gave to log_metric",
    ),
    Metric("evaluation/<dataset>/num_prompts", "prompts", "held-out prompts that were sampled"),
    Metric("evaluation/<dataset>/failures", "prompts", "held-out prompts whose reward failed; left out of the others"),
    Metric(
        "evaluation/<dataset>/completion_tokens_mean", "tokens", "mean sampled tokens of a completion, EOS included"
    ),
    Metric("evaluation/<dataset>/truncated_fraction", "fraction", "truncated completions / completions"),
    Metric("evaluation/<dataset>/turns_mean", "turns", "mean number of turns of a completion"),
    Metric(
        "evaluation/<dataset>/environment_reward_mean/<name>",
        "reward",
        "mean over completions of the sum of the rewards that the environment gave in all turns, unweighted",
    ),
    # What went wrong and was survived, since the run began, before it was resumed too.
    Metric("fault_tolerance/group_retries", "groups", "groups sent again because their replica died"),
    Metric("fault_tolerance/reward_workers_replaced", "actors", "reward actors killed for time or found dead"),
    Metric("fault_tolerance/failed_checkpoints", "checkpoints", "checkpoints that could not be written"),
    Metric("fault_tolerance/replica_restarts", "restarts", "rollout replicas that Serve started again"),
    Metric("fault_tolerance/learner_restarts", "restarts", "times the learner group was started again"),
    Metric("fault_tolerance/rewinds", "rewinds", "times the run went back to its newest checkpoint"),
    Metric("reporting/failures", "calls", "calls of a reporter that raised since the run was started or resumed"),
)

# Tune adds these to every result; they say which process ran, not how the training goes.
_BOOKKEEPING = frozenset(
    {
        "checkpoint_dir_name",
        "config",
        "date",
        "done",
        "episodes_total",
        "experiment_tag",
        "hostname",
        "iterations_since_restore",
        "node_ip",
        "pid",
        "should_checkpoint",
        "time_since_restore",
        "timesteps_since_restore",
        "timesteps_total",
        "trial_id",
    }
)


def flatten(result: Mapping[str, Any]) -> dict[str, Scalar]:
    """Turn a nested result into one flat row.

    Args:
        result: What ``Algorithm.train()`` returns: dictionaries of dictionaries of numbers.

    Returns:
        Keys joined by ``/`` -> bool, int, float or str, in the result's order. One-element numpy and torch values
        become Python numbers; Tune's bookkeeping and everything that is not a scalar are left out.
    """
    flat = nested.flatten(
        {key: value for key, value in result.items() if key not in _BOOKKEEPING}, separator="/", levels=None
    )
    plain = {key: value.item() if getattr(value, "shape", None) == () else value for key, value in flat.items()}
    return {key: value for key, value in plain.items() if isinstance(value, (bool, int, float, str))}


def held_out_set(key: str) -> str | None:
    """Name of the held-out set whose mean reward a flat key is, ``None`` for other keys."""
    match = _pattern("evaluation/<dataset>/reward_mean").fullmatch(key)
    return match[1] if match else None


def environment_name(key: str) -> str | None:
    """Name of the environment whose mean reward a flat key is, ``None`` for other keys."""
    match = _pattern("environment/<name>/reward_mean").fullmatch(key)
    return match[1] if match else None


def number(value: Scalar | None) -> float | None:
    """A value of a row as a number, ``None`` for texts and missing ones."""
    return float(value) if isinstance(value, (int, float)) else None


def finite(value: Any) -> Any:
    """The value, ``None`` for NaN and infinities: JSON has no name for them and strict readers refuse Python's."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric_for(key: str) -> Metric | None:
    """Find the declaration of a flat key, ``None`` for a key that the library does not declare."""
    # The exact keys first: a reward function may be called "failures".
    return min((metric for metric in METRICS if metric.match(key)), key=lambda metric: "<" in metric.key, default=None)


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", "(.+)", key))
