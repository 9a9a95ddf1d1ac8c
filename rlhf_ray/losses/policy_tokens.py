"""What all policy losses share: inputs checked and cleaned, the clipped surrogate, and metrics of the ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.advantages.kl import kl
from rlhf_ray.advantages.padding import blank, checked_mask
from rlhf_ray.advantages.ratio import log_difference, probability_ratio
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["PolicyTokens"]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """``[B, T]`` each, one sequence per row, 0 where masked; only ``logprobs`` has a gradient."""

    logprobs: Tensor
    """Under the policy being trained, in nats."""
    old_logprobs: Tensor
    """Under the policy of the ratio's denominator, in nats."""
    advantages: Tensor
    weights: Tensor
    """Of each token's loss; 1 where no behavior weights were given."""
    mask: Tensor
    """Bool, True where a token counts."""

    @classmethod
    def of(
        cls,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        behavior_weights: Tensor | None,
        *,
        clip: tuple[float, float] = (0.0, 0.0),
    ) -> PolicyTokens:
        """Check the shapes and the clip range (low, high), and :func:`blank` all that is not the mask.

        Raises:
            ValueError: The shapes differ or have not two dimensions; a bound is negative or not a number.
        """
        given = {} if behavior_weights is None else {"behavior_weights": behavior_weights}
        mask = checked_mask(mask, ndim=2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, **given)
        if not (clip[0] >= 0 and clip[1] >= 0):
            raise ValueError(f"clip_low = {clip[0]}, clip_high = {clip[1]}: must not be negative")
        weights = torch.ones_like(advantages) if behavior_weights is None else behavior_weights
        old_logprobs, advantages, weights = (blank(x.detach(), mask) for x in (old_logprobs, advantages, weights))
        return cls(blank(logprobs, mask), old_logprobs, advantages, weights, mask)

    def log_ratio(self) -> Tensor:
        """``[B, T]`` :func:`log_difference` of new and old policy, with a gradient."""
        return log_difference(self.logprobs, self.old_logprobs)

    def ratio(self) -> Tensor:
        """``[B, T]`` :func:`probability_ratio` of new and old policy, with a gradient."""
        return probability_ratio(self.logprobs, self.old_logprobs)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Average each row of ``[B, T]`` over its unmasked tokens, to ``[B, 1]``; 0 for a row without any.

        Of log-ratios: the logarithm of their ratios' geometric mean.
        """
        return blank(x, self.mask).sum(dim=1, keepdim=True) / self.mask.sum(dim=1, keepdim=True).clamp(min=1)

    def clipped_surrogate(
        self,
        ratio: Tensor,
        clip: tuple[float, float],
        aggregation: str,
        normalizer: float | Tensor | None,
        *,
        dual_clip: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``, weighted and aggregated.

        ``ratio`` carries the gradient; the metrics are those of :meth:`metrics` about it.
        """
        # The min, case by case: a positive advantage bounds the ratio from above only, a negative one from below (and,
        # dual clip, from above).
        low, high = 1 - clip[0], 1 + clip[1]
        bounded = torch.where(self.advantages >= 0, ratio.clamp(max=high), ratio.clamp(min=low, max=dual_clip))
        metrics = self.metrics(
            ratio,
            clipped_low=(self.advantages < 0) & (ratio < low),
            clipped_high=(self.advantages > 0) & (ratio > high),
        )
        return aggregate(-self.advantages * bounded * self.weights, self.mask, aggregation, normalizer), metrics

    def metrics(
        self, ratio: Tensor, *, clipped_low: Tensor | None = None, clipped_high: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return detached scalars over the unmasked tokens of this call; all are 0 when there are none.

        Args:
            ratio: ``[B, T]``, the ratio that the loss uses, before it is clipped.
            clipped_low: ``[B, T]`` bool, where the lower bound held; None, with ``clipped_high``: a loss without clip.
            clipped_high: ``[B, T]`` bool, where the upper bound held.

        Returns:
            All but ``ratio_max`` are means, which a caller combines over microbatches weighted by their tokens;
            ``ratio_max`` is combined by the maximum.

            - ``approx_kl``: KL from the old to the new policy by k3, in nats, never negative.
            - ``ratio_mean``, ``ratio_max``.
            - ``clip_fraction_low``, ``clip_fraction_high``, and their sum ``clip_fraction``, for a loss with a clip.
        """
        ratio = ratio.detach()
        means = {"approx_kl": kl(self.old_logprobs, self.logprobs.detach(), estimator="k3"), "ratio_mean": ratio}
        if clipped_low is not None and clipped_high is not None:
            low, high = clipped_low.to(ratio.dtype), clipped_high.to(ratio.dtype)
            means |= {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
        metrics = {name: aggregate(x, self.mask, "token_mean") for name, x in means.items()}
        # Ratios are positive, so 0 is neutral to the maximum over microbatches; a batch without tokens has no maximum.
        metrics["ratio_max"] = blank(ratio, self.mask).max() if ratio.numel() else ratio.sum()
        return metrics
