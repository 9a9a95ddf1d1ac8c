"""Per-token entropies -> the bonus that keeps the policy exploring."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.losses.aggregation import aggregate

__all__ = ["entropy_bonus"]


def entropy_bonus(
    entropies: Tensor,
    mask: Tensor,
    *,
    aggregation: str = "token_mean",
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregate entropies as a loss is aggregated. A bonus: subtract ``entropy_coef`` times it from the loss.

    >>> import torch
    >>> bonus, _ = entropy_bonus(torch.tensor([[0.5, 1.5, 9.0]]), torch.tensor([[1, 1, 0]]))
    >>> bonus.item()
    1.0

    Args:
        entropies: ``[B, T]``, entropy of the policy's distribution at each token, in nats, from
            :func:`token_logprobs_and_entropy`.
        mask: ``[B, T]``, True where a token counts.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The bonus, and ``entropy``: the detached mean over this call's unmasked tokens, in nats. Both are float32
        (float64 if ``entropies`` are).

    Raises:
        ValueError: The shapes differ.
    """
    metrics = {"entropy": aggregate(entropies.detach(), mask, "token_mean")}
    return aggregate(entropies, mask, aggregation, normalizer), metrics
