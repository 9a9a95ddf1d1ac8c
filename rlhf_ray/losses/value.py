"""The critic's values and the returns -> the critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_ray.advantages.padding import blank, checked_mask
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["value_loss"]


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
    huber: float | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, optionally clipped around the old values, optionally Huber's.

    Per token, with ``clipped = clamp(values, old_values - clip, old_values + clip)``::

        L = h(values - returns)                                 without clip
        L = max(h(values - returns), h(clipped - returns))      with clip

        h(e) = 1/2 * e^2                                        without huber, and where |e| <= huber
        h(e) = huber * (|e| - huber / 2)                        where |e| > huber

    Huber's loss (Peter J. Huber, "Robust Estimation of a Location Parameter", 1964) bounds the gradient of a token
    by ``huber``, so that a few returns far away do not take over the critic; the value that it is drawn to moves
    from the mean of the returns toward their median.

    The clipped form is that of the PPO authors' code; it is described in "Implementation Matters in Deep Policy
    Gradients: A Case Study on PPO and TRPO" (arXiv:2005.12729). A token whose value moved more than ``clip`` away
    from the old one, toward the return, gets no gradient. Only ``values`` gets a gradient.

    >>> values, old_values, returns = torch.tensor([[0.5, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    >>> loss, metrics = value_loss(values, old_values, returns, torch.ones(1, 2), clip=0.5)
    >>> loss.item(), metrics["value_clip_fraction"].item()  # 1/2 * (0.5^2 + 0.5^2) / 2
    (0.125, 0.5)

    Args:
        values: ``[B, T]``, from the critic being trained.
        old_values: ``[B, T]``, from the critic before the update.
        returns: ``[B, T]``, the targets.
        mask: ``[B, T]``, True where a token counts.
        clip: How far, in reward, a value may move from the old one and still be pulled on; None: off.
        huber: Error, in reward, beyond which the loss grows linearly; None: squared everywhere.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and detached means over this call's unmasked tokens (0 when there are none), all float32 (float64 if
        an input is):

        - ``value_clip_fraction``: tokens whose clipped error is the larger one; 0 without clip.
        - ``value_mean``, ``return_mean``: in reward.

    Raises:
        ValueError: The shapes differ, or ``clip`` or ``huber`` is not positive.
    """
    mask = checked_mask(mask, ndim=2, values=values, old_values=old_values, returns=returns)
    for name, setting in (("clip", clip), ("huber", huber)):
        if setting is not None and not setting > 0:
            raise ValueError(f"{name} = {setting}: must be positive, or None to switch it off")
    values, returns = blank(values, mask), blank(returns.detach(), mask)
    losses = _penalty(values - returns, huber)
    clipped_share = torch.zeros_like(returns)
    if clip is not None:
        old_values = blank(old_values.detach(), mask)
        clipped_losses = _penalty(values.clamp(old_values - clip, old_values + clip) - returns, huber)
        clipped_share = (clipped_losses > losses).to(returns.dtype)
        losses = torch.maximum(losses, clipped_losses)
    means = {"value_clip_fraction": clipped_share, "value_mean": values.detach(), "return_mean": returns}
    metrics = {name: aggregate(x, mask, "token_mean") for name, x in means.items()}
    return aggregate(losses, mask, aggregation, normalizer), metrics


def _penalty(errors: Tensor, huber: float | None) -> Tensor:
    if huber is None:
        return 0.5 * errors.square()
    return functional.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=huber)
