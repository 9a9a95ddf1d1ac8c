"""The configuration of DAPO."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["DAPOConfig"]


class DAPOConfig(AlgorithmConfig):
    """Builds a run of Decoupled Clip and Dynamic Sampling Policy Optimization.

    GRPO's advantage with four changes: the upper clip is wider than the lower one, so that unlikely tokens can grow;
    groups whose rewards are all equal are dropped and other prompts sampled in their place; the loss is a mean over all
    tokens of the minibatch; truncated completions are left out of it. There is no KL term.

    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (arXiv:2503.14476). The paper uses the last as
    "overlong filtering" or, instead, a penalty that grows with the length: add the reward ``overlong`` and set
    ``training(mask_truncated=False)`` for that.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "DAPO"
    defaults = {
        "rollouts": {"dynamic_sampling": True},
        "training": {
            "advantage": "grpo",
            "whiten_advantages": False,
            "loss_aggregation": "token_mean",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "mask_truncated": True,
        },
    }
