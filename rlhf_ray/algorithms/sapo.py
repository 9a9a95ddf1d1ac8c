"""The configuration of Soft Adaptive Policy Optimization."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["SAPOConfig"]


class SAPOConfig(AlgorithmConfig):
    """Builds a run of Soft Adaptive Policy Optimization: a gate that fades a token's gradient instead of a clip.

    GRPO's advantages; the gradient of a token shrinks smoothly as its ratio leaves 1, faster where the advantage is
    negative (temperatures 1.0 and 1.05).

    "Soft Adaptive Policy Optimization" (arXiv:2511.20347).

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "SAPO"
    defaults = {
        "training": {
            "advantage": "grpo",
            "loss": "sapo",
            "loss_args": {"temperature_positive": 1.0, "temperature_negative": 1.05},
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_mean",
        }
    }
