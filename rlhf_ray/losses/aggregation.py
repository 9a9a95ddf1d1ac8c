"""Per-token losses -> one number, with a denominator that no split of the batch can change.

====================================== ==================================== ===================================
mode                                   numerator                            denominator (``normalizer``)
====================================== ==================================== ===================================
``token_mean``                         sum over tokens                      unmasked tokens
``seq_mean_token_mean``                sum over sequences of token means    sequences
``seq_mean_token_sum``                 sum over tokens                      sequences
``seq_mean_token_sum_norm``            sum over tokens                      sequences x a constant length
====================================== ==================================== ===================================

A sequence without unmasked tokens is not counted. Where trajectories have several sequences, a row each, "sequences" in
this table are trajectories, which count once: see ``normalizer`` of :func:`aggregate`. ``token_mean`` is DAPO's ("DAPO:
An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476), ``seq_mean_token_mean`` GRPO's,
``seq_mean_token_sum_norm`` Dr. GRPO's ("Understanding R1-Zero-Like Training: A Critical Perspective",
arXiv:2503.20783).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_ray.advantages.padding import blank, checked_mask

__all__ = ["aggregate", "global_normalizer"]

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def aggregate(x: Tensor, mask: Tensor, mode: str, normalizer: float | Tensor | None = None) -> Tensor:
    """Reduce per-token numbers to one, by the table at the head of this module.

    >>> import torch
    >>> x, mask = torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> [round(aggregate(x, mask, mode).item(), 4) for mode in MODES]
    [2.6667, 3.0, 4.0, 2.0]

    Args:
        x: ``[B, T]``, one sequence per row.
        mask: ``[B, T]``, True where a token counts.
        mode: How tokens and sequences are weighted.
        normalizer: The denominator of the *whole* minibatch over all microbatches and ranks, as
            :func:`global_normalizer` counts it: results of the parts then add up to that of the whole. Or ``[B]``, one
            for each row: in ``seq_mean_token_mean`` a row that holds a fraction of its trajectory's tokens divides by
            the denominator over that fraction, so that the trajectory's rows add up to the mean over all its tokens.
            None: the denominator of this tensor alone, with its padded width ``T`` as the constant length.

    Returns:
        A scalar, float32 (float64 if ``x`` is); 0, with zero gradients, when everything is masked.

    Raises:
        ValueError: The shapes do not fit, the mode is unknown, or the normalizer is a number that is negative, or 0
            although there are unmasked tokens.
    """
    _check_mode(mode)
    mask = checked_mask(mask, ndim=2, x=x)
    lengths = mask.sum(dim=1)
    sums = blank(x, mask).sum(dim=1)
    of_rows = sums / lengths.clamp(min=1) if mode == "seq_mean_token_mean" else sums
    if isinstance(normalizer, Tensor):
        if normalizer.shape != lengths.shape:
            raise ValueError(f"normalizer {tuple(normalizer.shape)} does not fit {len(lengths)} rows")
        return (of_rows / normalizer).sum()
    total = of_rows.sum()
    if normalizer is None:
        return total / _own_normalizer(lengths, mode, mask.shape[1]).clamp(min=1)
    if not normalizer >= 0 or (normalizer == 0 and bool(mask.any())):
        raise ValueError(f"normalizer = {normalizer}: must be the positive count of {mode}'s denominator")
    return total / (normalizer or 1.0)


def global_normalizer(lengths: Sequence[int], mode: str, *, max_length: int | None = None) -> float:
    """Count the denominator of ``mode`` for a whole minibatch, from the lengths of its trajectories.

    Counts of disjoint sets of trajectories add up to the count of all.

    >>> [global_normalizer([2, 1, 0], mode, max_length=4) for mode in MODES]
    [3.0, 2.0, 2.0, 8.0]

    Args:
        lengths: Unmasked tokens of each trajectory, of all its sequences together, over all microbatches and ranks.
        mode: As in :func:`aggregate`.
        max_length: The constant length of ``seq_mean_token_sum_norm``, in tokens, usually
            ``rollouts.max_new_tokens``; the other modes do not use it.

    Returns:
        The denominator; 0 when there is no token.

    Raises:
        ValueError: The mode is unknown, a length is negative, or ``max_length`` is needed and not positive.
    """
    _check_mode(mode)
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must not be negative, got {min(lengths)}")
    if mode == "token_mean":
        return float(sum(map(int, lengths)))
    sequences = sum(length > 0 for length in lengths)
    if mode != "seq_mean_token_sum_norm":
        return float(sequences)
    if max_length is None or max_length <= 0:
        raise ValueError(f"max_length = {max_length}: {mode} divides by it; give a positive number of tokens")
    return float(sequences * max_length)


def _own_normalizer(lengths: Tensor, mode: str, width: int) -> Tensor:
    if mode == "token_mean":
        return lengths.sum()
    sequences = (lengths > 0).sum()
    return sequences * width if mode == "seq_mean_token_sum_norm" else sequences


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown aggregation {mode!r}; use one of {', '.join(MODES)}")
