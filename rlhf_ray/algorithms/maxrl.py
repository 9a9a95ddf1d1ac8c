"""The configuration of Maximum Likelihood Reinforcement Learning."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["MaxRLConfig"]


class MaxRLConfig(AlgorithmConfig):
    """Builds a run of Maximum Likelihood Reinforcement Learning: rewards of 0 and 1, hard prompts weighing most.

    .. math:: A_i = (R_i - mean(R)) / mean(R)

    follows the gradient of the logarithm of a prompt's success rate, as supervised learning does, instead of the rate
    itself. A group without success teaches nothing. Rewards must not be negative.

    "Maximum Likelihood Reinforcement Learning" (arXiv:2602.02710).

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "MaxRL"
    defaults = {
        "training": {
            "advantage": "maxrl",
            "whiten_advantages": False,
            "loss_aggregation": "token_mean",
        }
    }
