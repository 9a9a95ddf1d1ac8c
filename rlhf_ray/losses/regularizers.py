"""What is added to a policy loss: a bonus of the entropies, the likelihood of tokens, a KL to the reference."""

from __future__ import annotations

from torch import Tensor

from rlhf_ray.advantages.kl import kl
from rlhf_ray.advantages.padding import blank, checked_mask
from rlhf_ray.losses.aggregation import aggregate

__all__ = ["entropy_bonus", "kl_loss", "likelihood_loss"]


def entropy_bonus(
    entropies: Tensor,
    mask: Tensor,
    *,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
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


def likelihood_loss(
    logprobs: Tensor, mask: Tensor, *, normalizer: float | Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Negative log-likelihood of tokens, a mean over them.

    .. math:: L = - \frac{1}{\sum_i |o_i|} \sum_i \sum_t \log \pi(a_{i,t} | s_{i,t})

    Of the tokens of successful completions it is VAPO's "positive example LM loss" (arXiv:2504.05118, equation 13).

    >>> import torch
    >>> loss, _ = likelihood_loss(torch.tensor([[-0.5, -1.5, -9.0]]), torch.tensor([[1, 1, 0]]))
    >>> loss.item()
    1.0

    Args:
        logprobs: ``[B, T]``, log-probability of each token, in nats.
        mask: ``[B, T]``, True where a token counts.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and ``nll``: the detached mean over this call's unmasked tokens, in nats. Both are float32 (float64 if
        ``logprobs`` are).

    Raises:
        ValueError: The shapes differ.
    """
    metrics = {"nll": aggregate(-logprobs.detach(), mask, "token_mean")}
    return aggregate(-logprobs, mask, "token_mean", normalizer), metrics


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL divergence from the reference as a loss: the chosen estimator's value, with a gradient that is a KL's.

    With ``d = logprobs - ref_logprobs`` of tokens sampled from the policy, the gradient of ``KL(policy ||
    reference)`` at a token is the expectation of ``d * grad(logprobs)``, which is the derivative of k2. The
    derivative of an unbiased *value* is something else: that of k1 is ``grad(logprobs)``, 0 in expectation, so it
    regularizes nothing; that of k3 is ``(1 - exp(-d)) * grad(logprobs)``, in expectation the gradient of the other
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
