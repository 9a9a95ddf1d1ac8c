"""The configuration of PPO with a critic."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["PPOConfig"]


class PPOConfig(AlgorithmConfig):
    """Builds a run of Proximal Policy Optimization with a learned critic.

    The policy maximizes the clipped surrogate

    .. math:: E_t[ min(r_t A_t, clip(r_t, 1 - clip_{low}, 1 + clip_{high}) A_t) ]

    where ``r_t`` is the ratio of a token's probability under the policy being trained to that under the policy the
    batch started from, and ``A_t`` is the generalized advantage estimate from the critic's values; each token is an
    action.

    Papers: "Proximal Policy Optimization Algorithms" (arXiv:1707.06347); for language models, with the KL to a frozen
    reference taken off the reward, "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593) and
    "Training language models to follow instructions with human feedback" (arXiv:2203.02155). Unlike the latter two, the
    reference is off by default: ``training(kl_coef=...)`` starts it.

    Example:
        ::

            algo = PPOConfig().training(lr=2e-4).evaluation(interval=10).build_algo()
            result = algo.train()
    """

    __slots__ = ()

    algorithm_name = "PPO"
