"""The model's logits -> log-probabilities of the sampled tokens, and entropies.

All results are float32 (float64 for float64 logits): a ratio of policies is the exponential of a difference of two
of them, and bfloat16 has 3 digits. No ``[..., V]`` tensor of log-probabilities is built: what leaves is ``[...]``,
and the logits are the one large tensor that is kept for the backward pass (two, with a gradient of the entropy).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import widened

__all__ = ["token_entropy", "token_logprobs", "token_logprobs_and_entropy"]


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``log softmax(logits / temperature)`` at the targets: ``logit / T - logsumexp(logits / T)``.

    >>> logits = torch.tensor([[1.0, 1.0, 2.0]]).log()
    >>> token_logprobs(logits, torch.tensor([2])).exp()
    tensor([0.5000])

    Args:
        logits: ``[..., V]``, any floating dtype.
        targets: ``[...]`` int64, ids in ``[0, V)``; at padding any valid id.
        temperature: The one that the tokens were sampled at, positive.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), in nats.

    Raises:
        ValueError: The shapes do not fit, or the temperature is not positive.
    """
    _check_targets(logits, targets)
    return _select(_scaled(logits, temperature), targets)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the entropy of ``softmax(logits / temperature)``: ``logsumexp(x) - sum(softmax(x) * x)``.

    A caller that only reports the entropy should call this under ``torch.no_grad()``, which keeps nothing for
    the backward pass. A logit of minus infinity counts as probability 0.

    >>> token_entropy(torch.zeros(1, 2))  # ln 2
    tensor([0.6931])

    Args:
        logits: ``[..., V]``, any floating dtype.
        temperature: The one that the tokens were sampled at, positive.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), in nats.

    Raises:
        ValueError: The temperature is not positive.
    """
    return _entropy(_scaled(logits, temperature))


def token_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`token_logprobs` and, on demand, :func:`token_entropy`, both with a gradient.

    Args:
        logits: ``[..., V]``, any floating dtype.
        targets: ``[...]`` int64, ids in ``[0, V)``; at padding any valid id.
        temperature: The one that the tokens were sampled at, positive.
        with_entropy: Compute the entropy too; it costs further ``[..., V]`` tensors.

    Returns:
        Log-probabilities and entropies, ``[...]`` float32 (float64 for float64 logits) each, in nats; None instead of
        the entropies when they were not asked for.

    Raises:
        ValueError: The shapes do not fit, or the temperature is not positive.
    """
    _check_targets(logits, targets)
    scaled = _scaled(logits, temperature)
    return _select(scaled, targets), _entropy(scaled) if with_entropy else None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    # Dividing by 1 would cost one more [..., V] tensor.
    return widened(logits) if temperature == 1.0 else widened(logits) / temperature


def _select(scaled: Tensor, targets: Tensor) -> Tensor:
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def _entropy(scaled: Tensor) -> Tensor:
    # An offset of all logits changes nothing but the size of the two terms, whose difference would lose digits.
    shifted = scaled - scaled.detach().amax(dim=-1, keepdim=True)
    # A finite floor under the logits: 0 * -inf would be NaN.
    floored = shifted.clamp(min=torch.finfo(shifted.dtype).min)
    return torch.logsumexp(shifted, dim=-1) - (torch.softmax(shifted, dim=-1) * floored).sum(dim=-1)


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}; expected [..., V]")
