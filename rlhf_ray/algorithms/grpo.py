"""The configuration of Group Relative Policy Optimization."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["GRPOConfig"]


class GRPOConfig(AlgorithmConfig):
    """Builds a run of Group Relative Policy Optimization: PPO's loss, and the prompt's other completions as baseline.

    With the rewards ``R`` of the ``G`` completions of a prompt, every token of completion ``i`` has the advantage

    .. math:: A_i = (R_i - mean(R)) / (std(R) + eps)

    and the loss is PPO's clipped surrogate, averaged over the tokens of a completion, then over completions, plus
    ``kl_coef`` times the KL to the frozen reference by the k3 estimator. There is no critic.

    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (arXiv:2402.03300), with its
    coefficient of 0.04. ``training(kl_coef=0.0)`` starts no reference.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "GRPO"
    defaults = {
        "training": {
            "advantage": "grpo",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_mean",
            "kl_coef": 0.04,
            "kl_in": "loss",
            "kl_estimator": "k3",
        }
    }
