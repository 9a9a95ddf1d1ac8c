"""Shape checks, precision, and keeping what lies under the padding out.

Padding may hold anything, NaN and infinity included. Multiplying by a 0/1 mask is not enough, because
``0 * nan`` is NaN, forward and backward. So masked positions are overwritten *before* the first operation:
the backward pass of ``masked_fill`` then writes an exact 0 there, whatever lies behind it.

Half precision is widened at the same place: bfloat16 has 3 digits, and float16 ends at 65,504, which a sum over the
tokens of a batch exceeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["blank", "checked_mask", "widened"]


def checked_mask(mask: Tensor, *, ndim: int | None = None, **tensors: Tensor) -> Tensor:
    """Check that ``tensors`` have the mask's shape, and return the mask as booleans.

    Args:
        mask: True (or 1) where a position counts.
        ndim: Dimensions that the mask must have; None: any.
        tensors: What must have the mask's shape, under the names that the message should use.

    Returns:
        The mask, dtype bool.

    Raises:
        ValueError: The shapes differ, or the mask has another number of dimensions.
    """
    if any(tensor.shape != mask.shape for tensor in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in {**tensors, "mask": mask}.items())
        raise ValueError(f"shapes differ: {shapes}")
    if ndim is not None and mask.ndim != ndim:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {ndim} dimensions")
    return mask.bool()


def blank(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x``, :func:`widened`, with 0 where ``mask`` (bool) is False; no value and no gradient passes there."""
    return widened(x).masked_fill(~mask, 0.0)


def widened(x: Tensor) -> Tensor:
    """Return float64 as it is and everything else as float32; its gradient has the dtype of ``x``."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
