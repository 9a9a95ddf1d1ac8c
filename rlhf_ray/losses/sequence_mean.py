"""Used in stage 5 by the losses whose ratio is that of a sequence: the mean over the tokens of each row."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.padding import blank

__all__ = ["sequence_mean"]


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average each row over its unmasked tokens. Of log-ratios: the logarithm of their ratios' geometric mean.

    >>> import torch
    >>> mask = torch.tensor([[True, True, False], [False, False, False]])
    >>> sequence_mean(torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0]]), mask)
    tensor([[1.5000],
            [0.0000]])

    Args:
        x: ``[B, T]``, one sequence a row.
        mask: ``[B, T]`` bool, True where a token counts.

    Returns:
        ``[B, 1]``; 0 for a row without unmasked tokens.
    """
    return blank(x, mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
