"""Log-probabilities and advantages -> PPO's clipped policy loss."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.losses.policy_tokens import PolicyTokens

__all__ = ["ppo_loss"]


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    behavior_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of PPO, to be minimized.

    With ``ratio = exp(logprobs - old_logprobs)``, per token::

        L = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        L = min(L, -dual_clip * A)      where A < 0, when dual_clip is given
        L = behavior_weight * L         when behavior_weights are given

    - "Proximal Policy Optimization Algorithms" (arXiv:1707.06347).
    - Clip bounds that differ: "DAPO" (arXiv:2503.14476).
    - Dual clip, a bound where a bad token became far likelier: "Mastering Complex Control in MOBA Games with Deep
      Reinforcement Learning" (arXiv:1912.09729).
    - Behavior weights, ``pi_proximal / pi_behavior``, with ``old_logprobs`` of the proximal policy: decoupled PPO,
      "Batch size-invariance for policy optimization" (arXiv:2110.00641), "AReaL" (arXiv:2505.24298).

    The log-ratio is bounded from above by :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`. Only ``logprobs`` gets
    a gradient; a token whose ratio lies beyond an active bound gets none.

    >>> import torch
    >>> old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> loss, metrics = ppo_loss(new, old, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2), clip_low=0.2, clip_high=0.2)
    >>> round(loss.item(), 4), round(metrics["clip_fraction"].item(), 4)  # -(1.2 + 0.5) / 2
    (-0.85, 0.5)

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats;
            computed in float32 when they are shorter.
        old_logprobs: ``[B, T]``, under the policy of which PPO stays near.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        clip_low: The ratio is clipped from below at ``1 - clip_low``.
        clip_high: The ratio is clipped from above at ``1 + clip_high``.
        dual_clip: Bound, greater than 1, of the ratio at negative advantages; None: off.
        behavior_weights: ``[B, T]``, weight of each token's loss; None: 1.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and detached scalars over this call's unmasked tokens. All but ``ratio_max`` are means, which a
        caller combines over microbatches weighted by their tokens; ``ratio_max`` is combined by the maximum. All
        are 0 when everything is masked.

        - ``clip_fraction_high``: tokens with A > 0 and a ratio above ``1 + clip_high``.
        - ``clip_fraction_low``: tokens with A < 0 and a ratio below ``1 - clip_low``.
        - ``clip_fraction``: either of these. Tokens held by the dual clip are not among them.
        - ``approx_kl``: KL from the old to the new policy by k3, in nats, never negative.
        - ``ratio_mean``, ``ratio_max``.

    Raises:
        ValueError: The shapes differ, a clip is negative, or ``dual_clip`` is not greater than 1.
    """
    clip = (clip_low, clip_high)
    tokens = PolicyTokens.of(logprobs, old_logprobs, advantages, mask, behavior_weights, clip=clip)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip = {dual_clip}: must be greater than 1")
    return tokens.clipped_surrogate(tokens.ratio(), clip, aggregation, normalizer, dual_clip=dual_clip)
