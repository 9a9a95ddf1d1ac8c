"""Advantages -> advantages of mean 0 and standard deviation 1."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.moments import Moments
from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["whiten"]


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    moments: Moments | None = None,
) -> Tensor:
    """Shift and scale the unmasked numbers to mean 0 and standard deviation 1.

    ``(x - mean) / sqrt(variance + eps)``, over all unmasked numbers of the tensor, or of the batch of which the
    tensor is a shard when ``moments`` are given: shards whitened with merged moments equal the whole whitened at
    once. Mean and variance are constants to the gradient.

    >>> import torch
    >>> whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]]))
    tensor([[-1.,  0.,  1.,  0.]])

    Args:
        x: Any shape.
        mask: The same shape, True where a number counts.
        unbiased: Divide the squared deviations by ``count - 1`` rather than by ``count``.
        eps: Added to the variance, so that equal numbers give 0 rather than NaN.
        moments: Mean and variance to use; None: those of ``x`` itself.

    Returns:
        The same shape and dtype, computed in double precision, 0 at masked positions.

    Raises:
        ValueError: The shapes differ.
    """
    mask = checked_mask(mask, x=x)
    if moments is None:
        moments = Moments.of(x, mask)
    scale = (moments.variance(unbiased=unbiased) + eps) ** -0.5
    # In double precision, or a mean that is large next to the spread would eat the digits.
    whitened = (blank(x, mask).double() - moments.mean) * scale
    return blank(whitened, mask).to(x.dtype)
