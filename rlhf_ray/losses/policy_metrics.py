"""Used by every policy loss of stage 5: how far the policy has moved from the old one, and how often a clip held."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.kl import kl
from rlhf_ray.advantages.padding import blank
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["policy_metrics"]


def policy_metrics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ratio: Tensor,
    mask: Tensor,
    *,
    clipped_low: Tensor | None = None,
    clipped_high: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return detached scalars over the unmasked tokens of this call; all are 0 when there are none.

    Args:
        logprobs: ``[B, T]``, log-probabilities under the policy being trained, in nats, 0 where masked.
        old_logprobs: ``[B, T]``, under the policy of the ratio's denominator, likewise.
        ratio: ``[B, T]``, the ratio that the loss uses, before it is clipped.
        mask: ``[B, T]`` bool, True where a token counts.
        clipped_low: ``[B, T]`` bool, where the lower bound held; none, with ``clipped_high``: a loss without clip.
        clipped_high: ``[B, T]`` bool, where the upper bound held.

    Returns:
        All but ``ratio_max`` are means, which a caller combines over microbatches weighted by their tokens;
        ``ratio_max`` is combined by the maximum.

        - ``approx_kl``: KL from the old to the new policy by k3, in nats, never negative.
        - ``ratio_mean``, ``ratio_max``.
        - ``clip_fraction_low``, ``clip_fraction_high``, and their sum ``clip_fraction``, for a loss with a clip.
    """
    ratio = ratio.detach()
    means = {"approx_kl": kl(old_logprobs, logprobs.detach(), estimator="k3"), "ratio_mean": ratio}
    if clipped_low is not None and clipped_high is not None:
        low, high = clipped_low.to(ratio.dtype), clipped_high.to(ratio.dtype)
        means |= {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
    metrics = {name: aggregate(x, mask, "token_mean") for name, x in means.items()}
    # Ratios are positive, so 0 is neutral to the maximum over microbatches; a batch without tokens has no maximum.
    metrics["ratio_max"] = blank(ratio, mask).max() if ratio.numel() else ratio.sum()
    return metrics
