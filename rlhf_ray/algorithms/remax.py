"""The configuration of ReMax."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["ReMaxConfig"]


class ReMaxConfig(AlgorithmConfig):
    """Builds a run of ReMax: the reward of a greedily decoded completion of the same prompt as baseline.

    .. math:: A_i = R_i - R_{greedy}

    The greedy completion costs a further generation per prompt and is not trained on. One completion per prompt is
    enough.

    "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models"
    (arXiv:2310.10505). The paper sums the tokens of a completion and takes one step per batch.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "ReMax"
    defaults = {
        "training": {
            "advantage": "remax",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_sum",
        }
    }
