"""The configuration of Geometric-Mean Policy Optimization."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["GMPOConfig"]


class GMPOConfig(AlgorithmConfig):
    """Builds a run of Geometric-Mean Policy Optimization: GRPO that averages a sequence's ratios geometrically.

    Each token's log-ratio is clipped first, at 0.4 nats, then their mean is taken, which outliers move less than the
    arithmetic mean of GRPO.

    "Geometric-Mean Policy Optimization" (arXiv:2507.20673).

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "GMPO"
    defaults = {
        "training": {
            "advantage": "grpo",
            "loss": "gmpo",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_mean",
            "clip_low": 0.4,
            "clip_high": 0.4,
        }
    }
