"""The configuration of CISPO."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["CISPOConfig"]


class CISPOConfig(AlgorithmConfig):
    """Builds a run of Clipped Importance Sampling Policy Optimization: the weight is clipped, never the gradient.

    REINFORCE with GRPO's advantages and the ratio, clipped and without a gradient of its own, as each token's weight,
    so that rare tokens keep contributing where PPO's clip would drop them.

    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (arXiv:2506.13585), without a lower
    bound. The paper tunes the upper one and does not print it; 0.28 is DAPO's.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "CISPO"
    defaults = {
        "training": {
            "advantage": "grpo",
            "loss": "cispo",
            "whiten_advantages": False,
            "loss_aggregation": "token_mean",
            "clip_low": 1.0,
            "clip_high": 0.28,
        }
    }
