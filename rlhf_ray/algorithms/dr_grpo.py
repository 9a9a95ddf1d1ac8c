"""The configuration of Dr. GRPO."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["DrGRPOConfig"]


class DrGRPOConfig(AlgorithmConfig):
    """Builds a run of Dr. GRPO: GRPO without its two biases.

    The advantage is not divided by the group's standard deviation, which weighs easy and hard prompts more than those
    between, and a completion's tokens are summed and divided by a constant, ``rollouts.max_new_tokens``, and not by its
    own length, which favors long wrong answers:

    .. math:: A_i = R_i - mean(R)

    "Understanding R1-Zero-Like Training: A Critical Perspective" (arXiv:2503.20783), which has no KL term.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "DrGRPO"
    defaults = {
        "training": {
            "advantage": "dr_grpo",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_sum_norm",
        }
    }
