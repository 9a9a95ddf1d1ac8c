"""Log-probabilities under proximal and behavior policy -> weights that correct stale data."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask
from rlhf_ray.advantages.ratio import MAX_LOG_RATIO, log_difference
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["behavior_weights"]

LEVELS = ("token", "sequence")
MODES = ("truncate", "mask")


def behavior_weights(
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str,
    mode: str,
    cap: float,
    floor: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight each token's loss by ``pi_proximal / pi_behavior``, bounded: truncated importance sampling.

    With ``d = proximal_logprobs - behavior_logprobs``, and ``floor = 0`` when none is given::

        w = exp(d)                                            level "token"
        w = exp(sum of d over the unmasked tokens of a row)   level "sequence", the same at each of its tokens

        weight = clip(w, floor, cap)                          mode "truncate"
        weight = w where floor <= w <= cap, else 0            mode "mask"

    - Decoupled PPO, which clips against a recent (proximal) policy, and corrects for the older (behavior) policy
      that wrote the tokens: "Batch size-invariance for policy optimization" (arXiv:2110.00641); for language models
      "AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning" (arXiv:2505.24298).
    - A token's weight corrects the choice of that token, not that of the tokens before it: a bias, with little
      variance. A sequence's weight is the plain product over its tokens, not their geometric mean: without bounds it
      is unbiased, and its spread grows exponentially with the length.
    - A token of weight 0 still counts in the denominator of a loss, as in an average over all samples. To
      divide by what is left, pass ``mask & (weights > 0)`` as the loss's mask, and count its ``normalizer`` from it.

    What is exponentiated, each token's log-ratio or each sequence's sum, is bounded from above by
    :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`; the tokens of a sum are not. No gradient passes.

    >>> import torch
    >>> proximal, behavior = torch.tensor([[0.8, 0.3]]).log(), torch.tensor([[0.2, 0.6]]).log()
    >>> behavior_weights(proximal, behavior, torch.ones(1, 2), level="token", mode="truncate", cap=2.0)[0]
    tensor([[2.0000, 0.5000]])
    >>> behavior_weights(proximal, behavior, torch.ones(1, 2), level="sequence", mode="truncate", cap=2.5)[0]
    tensor([[2.0000, 2.0000]])

    Args:
        proximal_logprobs: ``[B, T]``, log-probabilities under the policy that a loss takes as the old one, in nats,
            one sequence per row.
        behavior_logprobs: ``[B, T]``, under the policy that wrote the tokens (its sampling log-probabilities).
        mask: ``[B, T]``, True where a token counts.
        level: ``token`` or ``sequence``.
        mode: ``truncate`` or ``mask``.
        cap: Largest weight, at least 1, so that the weight of on-policy data is 1; infinity: no bound.
        floor: Smallest weight, or in mode ``mask`` the smallest that is not zeroed, from 0 to 1; None: 0.

    Returns:
        The weights, ``[B, T]`` float32 (float64 if an input is), 0 where masked: what :func:`ppo_loss` takes as
        ``behavior_weights``. And detached scalars over this call's unmasked tokens (0 when there are none), combined
        over microbatches by the maximum (``_max``) or as means weighted by tokens:

        - ``behavior_weight_mean``: of the weights returned; without bounds about 1.
        - ``behavior_ratio_max``: of ``w``, before the bounds.
        - ``behavior_clip_fraction``: tokens whose ``w`` lies above ``cap`` or below ``floor``.

    Raises:
        ValueError: The shapes differ, level or mode are unknown, ``cap`` is below 1, or ``floor`` not from 0 to 1.
    """
    mask = checked_mask(mask, ndim=2, proximal_logprobs=proximal_logprobs, behavior_logprobs=behavior_logprobs)
    _check_choices(level, mode, cap, floor)
    log_ratios = log_difference(blank(proximal_logprobs.detach(), mask), blank(behavior_logprobs.detach(), mask))
    if level == "sequence":
        log_ratios = log_ratios.sum(dim=1, keepdim=True).expand_as(log_ratios)
    ratios = blank(log_ratios.clamp(max=MAX_LOG_RATIO).exp(), mask)
    smallest = 0.0 if floor is None else floor
    # Not "inside": a comparison with NaN is False, and a NaN among the inputs must not become a weight of 0.
    outside = mask & ((ratios < smallest) | (ratios > cap))
    weights = blank(ratios.clamp(smallest, cap), mask) if mode == "truncate" else blank(ratios, ~outside)
    # In float64, since a sequence's weight may be smaller than any float32.
    return weights, {
        "behavior_weight_mean": aggregate(weights.double(), mask, "token_mean").to(weights.dtype),
        "behavior_ratio_max": ratios.max() if ratios.numel() else ratios.sum(),
        "behavior_clip_fraction": aggregate(outside.to(weights.dtype), mask, "token_mean"),
    }


def _check_choices(level: str, mode: str, cap: float, floor: float | None) -> None:
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; use one of {', '.join(LEVELS)}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
    if not cap >= 1:
        raise ValueError(f"cap = {cap}: must be at least 1, the weight of on-policy data")
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"floor = {floor}: must be from 0 to 1, the weight of on-policy data")
