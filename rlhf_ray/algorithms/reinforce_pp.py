"""The configuration of REINFORCE++, in its two forms."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["ReinforcePPBaselineConfig", "ReinforcePPConfig"]


class ReinforcePPConfig(AlgorithmConfig):
    """Builds a run of REINFORCE++: PPO without a critic, its advantages whitened over the whole batch.

    A token's advantage is its reward-to-go, with the KL to the frozen reference (k1) taken off every token's reward:

    .. math:: A_t = R - kl_{coef} sum_{i >= t} KL_i

    then whitened over all tokens of the batch. One completion per prompt is enough.

    "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization" (arXiv:2501.03262).
    The coefficient is that of the examples of OpenRLHF, its authors' code.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "ReinforcePP"
    defaults = {
        "training": {
            "advantage": "reinforce_plus_plus",
            "whiten_advantages": True,
            "kl_coef": 1e-3,
            "kl_in": "reward",
            "kl_estimator": "k1",
        }
    }


class ReinforcePPBaselineConfig(AlgorithmConfig):
    """Builds a run of REINFORCE++ with a group baseline: the mean reward of the prompt's completions is subtracted.

    .. math:: A_i = R_i - mean(R)

    for every token of completion ``i``, then whitened over all tokens of the batch rather than by the group's own
    standard deviation. The KL to the frozen reference is in the loss, by k2.

    "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization" (arXiv:2501.03262).
    The coefficient is that of the examples of OpenRLHF, its authors' code.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "ReinforcePPBaseline"
    defaults = {
        "training": {
            "advantage": "dr_grpo",
            "whiten_advantages": True,
            "kl_coef": 1e-3,
            "kl_in": "loss",
            "kl_estimator": "k2",
        }
    }
