"""The model's logits -> log-probabilities of the sampled tokens, and entropies.

All results are float32 (float64 for float64 logits): a ratio of policies is the exponential of a difference of two
of them, and bfloat16 has 3 digits. No ``[..., V]`` tensor of log-probabilities is built: what leaves is ``[...]``,
and the logits are the one large tensor that is kept for the backward pass (two, with a gradient of the entropy).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.advantages.kl import kl
from rlhf_ray.advantages.padding import blank, checked_mask, widened
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["entropy_bonus", "kl_loss", "token_entropy", "token_logprobs", "token_logprobs_and_entropy"]


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


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    aggregation: str = "token_mean",
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL divergence from the reference as a loss: the chosen estimator's value, with a gradient that is a KL's.

    With ``d = logprobs - ref_logprobs`` of tokens sampled from the policy, the gradient of ``KL(policy ||
    reference)`` at a token is the expectation of ``d * grad(logprobs)``, which is the derivative of k2. The
    derivative of an unbiased *value* is something else: that of k1 is ``grad(logprobs)``, 0 in expectation, so it
    regularises nothing; that of k3 is ``(1 - exp(-d)) * grad(logprobs)``, in expectation the gradient of the other
    divergence, ``KL(reference || policy)``. See "On a few pitfalls in KL divergence gradient estimation for RL"
    (arXiv:2506.09477). So here:

    ========= =========================================== ========================================================
    k1, k3    value of k1, k3; gradient of k2             the gradient of the KL
    k2        value and gradient of k2                    the gradient of the KL
    abs       value and gradient of ``|d|``               that of the sum of ``|policy - reference|`` over the
                                                          vocabulary: bounded, but not a KL's
    ========= =========================================== ========================================================

    "The gradient" is exact in expectation for tokens sampled from the current policy, and the usual approximation
    after further optimizer steps on the same batch. It is that of each token's own distribution: how a token
    changes the KL of the tokens after it is left out. With the KL in the reward (:func:`kl_penalized_rewards`)
    returns carry that too.

    >>> import torch
    >>> policy, reference = torch.tensor([[0.5]]).log().requires_grad_(), torch.tensor([[0.25]]).log()
    >>> loss, _ = kl_loss(policy, reference, torch.ones(1, 1), estimator="k3")
    >>> loss.backward()
    >>> round(loss.item(), 4), round(policy.grad.item(), 4)  # 1/2 - 1 + ln 2, and ln 2
    (0.1931, 0.6931)

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats.
        ref_logprobs: ``[B, T]``, under the reference; gets no gradient.
        mask: ``[B, T]``, True where a token counts.
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``, see :func:`rlhf_ray.advantages.kl`.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss (without coefficient), and ``kl``: the estimator's detached mean over this call's unmasked tokens,
        in nats. Both are float32 (float64 if an input is).

    Raises:
        ValueError: The shapes differ, or the estimator is unknown.
    """
    mask = checked_mask(mask, ndim=2, logprobs=logprobs, ref_logprobs=ref_logprobs)
    logprobs, ref_logprobs = blank(logprobs, mask), blank(ref_logprobs.detach(), mask)
    values = kl(logprobs, ref_logprobs, estimator=estimator)
    metrics = {"kl": aggregate(values.detach(), mask, "token_mean")}
    if estimator in ("k1", "k3"):
        surrogate = kl(logprobs, ref_logprobs, estimator="k2")
        values = values.detach() + (surrogate - surrogate.detach())
    return aggregate(values, mask, aggregation, normalizer), metrics


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
