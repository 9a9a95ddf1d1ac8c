"""The configuration of REINFORCE Leave-One-Out."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["RLOOConfig"]


class RLOOConfig(AlgorithmConfig):
    """Builds a run of REINFORCE Leave-One-Out: the mean reward of the *other* completions as baseline.

    .. math:: A_i = R_i - mean(R_j, j != i)

    ``R`` is the reward less ``kl_coef`` times the KL to the frozen reference, summed over the completion (k1), which is
    one action: its tokens are summed, not averaged.

    "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs"
    (arXiv:2402.14740). The paper takes one step per batch, where PPO's clip never acts; with
    ``training.num_minibatches`` above 1 it keeps the later steps near the policy that sampled. The
    coefficient is that of TRL's implementation.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "RLOO"
    defaults = {
        "training": {
            "advantage": "rloo",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_sum",
            "kl_coef": 0.05,
            "kl_in": "reward",
            "kl_estimator": "k1",
        }
    }
