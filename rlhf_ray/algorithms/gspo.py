"""The configuration of Group Sequence Policy Optimization."""

from __future__ import annotations

from rlhf_ray.config.builder import AlgorithmConfig

__all__ = ["GSPOConfig"]


class GSPOConfig(AlgorithmConfig):
    """Builds a run of Group Sequence Policy Optimization: GRPO that clips whole sequences instead of tokens.

    All tokens of a completion share one ratio, the geometric mean of theirs,

    .. math:: s_i = exp(1/T_i sum_t (log pi(t) - log pi_{old}(t)))

    which is clipped far more narrowly than a token's, since it moves far less.

    "Group Sequence Policy Optimization" (arXiv:2507.18071), with its bounds of 3e-4 and 4e-4 for completions of
    thousands of tokens. A mean over few tokens moves more: where most tokens are clipped (``learner/clip_fraction``),
    widen them.

    Batch, group size, learning rate and optimizer steps are the library's defaults.
    """

    __slots__ = ()

    algorithm_name = "GSPO"
    defaults = {
        "training": {
            "advantage": "grpo",
            "loss": "gspo",
            "whiten_advantages": False,
            "loss_aggregation": "seq_mean_token_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
        }
    }
