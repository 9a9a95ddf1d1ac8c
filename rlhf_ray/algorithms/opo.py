"""The configuration of On-Policy RL with Optimal Reward Baseline."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["OPOConfig"]


class OPOConfig(AlgorithmConfig):
    """Builds a run of On-Policy RL with Optimal Reward Baseline: the baseline of least variance, strictly on policy.

    .. math:: A_i = R_i - sum_j T_j R_j / sum_j T_j

    with the lengths ``T`` of the group's completions as weights. One optimizer step per batch keeps it on policy, so
    that no clip acts; no KL and no entropy term.

    "On-Policy RL with Optimal Reward Baseline" (arXiv:2505.23585).

    Batch, group size and learning rate are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "OPO"
    defaults = {
        "training": {
            "advantage": "opo",
            "whiten_advantages": False,
            "loss_aggregation": "token_mean",
            "num_minibatches": 1,
        }
    }
