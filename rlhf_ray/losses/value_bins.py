"""A critic that predicts a distribution over returns: bins <-> values, and the loss that it learns by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask, widened
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["expected_value", "hl_gauss_loss"]


def expected_value(logits: Tensor, *, low: float, high: float) -> Tensor:
    """Mean of the distributions whose logits are given, each bin at its center.

    >>> expected_value(torch.tensor([0.0, 0.0, math.log(2.0)]), low=0.0, high=3.0)  # (0.5 + 1.5 + 2 * 2.5) / 4
    tensor(1.7500)

    Args:
        logits: ``[..., K]``, of K bins of equal width from ``low`` to ``high``.
        low: Lower edge of the first bin, in reward.
        high: Upper edge of the last bin, in reward.

    Returns:
        ``[...]``, in reward, float32 (float64 if ``logits`` are).
    """
    logits = widened(logits)
    return logits.softmax(dim=-1) @ _centers(logits, low, high)


def hl_gauss_loss(
    value_logits: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    low: float,
    high: float,
    smoothing: float = 0.75,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Cross-entropy of a critic's distribution with the return, blurred to a normal distribution (HL-Gauss).

    With bins of width ``w`` between edges ``e_0 ... e_K``, ``s = smoothing * w``, and the return ``y``::

        p_k = (Phi((e_(k+1) - y) / s) - Phi((e_k - y) / s)) / (Phi((e_K - y) / s) - Phi((e_0 - y) / s))
        L   = - sum_k p_k log softmax(value_logits)_k

    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL" (arXiv:2403.03950, section 3.1),
    which takes 0.75 for ``smoothing``. Returns beyond the bins are taken for those at their edge. Only
    ``value_logits`` gets a gradient.

    >>> logits, returns = torch.zeros(1, 1, 4), torch.tensor([[1.0]])
    >>> loss, metrics = hl_gauss_loss(logits, returns, torch.ones(1, 1), low=0.0, high=2.0)
    >>> round(loss.item(), 4), metrics["value_mean"].item()  # log 4, the mean of a uniform distribution
    (1.3863, 1.0)

    Args:
        value_logits: ``[B, T, K]``, from the critic being trained.
        returns: ``[B, T]``, the targets, in reward.
        mask: ``[B, T]``, True where a token counts.
        low: Lower edge of the first bin, in reward.
        high: Upper edge of the last bin, in reward.
        smoothing: Standard deviation of the target in widths of a bin.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss in nats, and detached means over this call's unmasked tokens, ``value_mean`` and ``return_mean``, in
        reward; all float32 (float64 if an input is).

    Raises:
        ValueError: The shapes differ, there are fewer than two bins, or ``low``, ``high`` or ``smoothing`` make none.
    """
    if value_logits.ndim != 3 or value_logits.shape[-1] < 2 or not low < high or not smoothing > 0:
        shape = tuple(value_logits.shape)
        raise ValueError(f"value_logits {shape}, bins from {low} to {high}, smoothing {smoothing}: no distribution")
    mask = checked_mask(mask, ndim=2, returns=returns, value_logits=value_logits[..., 0])
    returns = blank(returns.detach(), mask)
    logits = widened(value_logits).masked_fill(~mask[..., None], 0.0)
    edges = torch.linspace(low, high, logits.shape[-1] + 1, dtype=torch.float64, device=logits.device)
    deviation = smoothing * (high - low) / logits.shape[-1]
    # Ranks below and above the bins are the same for a return at an edge: half of the target is cut off.
    places = (edges - returns.double().clamp(low, high)[..., None]) / (deviation * math.sqrt(2.0))
    heights = torch.erf(places)
    target = heights.diff(dim=-1) / (heights[..., -1:] - heights[..., :1])
    losses = -(target.to(logits.dtype) * logits.log_softmax(dim=-1)).sum(dim=-1)
    values = expected_value(logits.detach(), low=low, high=high)
    means = {"value_mean": blank(values, mask), "return_mean": returns}
    metrics = {name: aggregate(x, mask, "token_mean") for name, x in means.items()}
    return aggregate(losses, mask, aggregation, normalizer), metrics


def _centers(logits: Tensor, low: float, high: float) -> Tensor:
    count = logits.shape[-1]
    width = (high - low) / count
    return torch.linspace(low + width / 2, high - width / 2, count, dtype=logits.dtype, device=logits.device)
