"""Per-token estimates of the KL divergence from the reference policy, and a weight of its penalty that follows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_ray.advantages.padding import widened
from rlhf_ray.advantages.ratio import MAX_LOG_RATIO

__all__ = ["AdaptiveKLController", "kl"]

MAX_ERROR = 0.2
"""Largest relative error of the KL, in either direction, to which one update responds."""


def kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimate ``KL(policy || reference)`` at each token from the sampled token alone.

    With ``d = logprobs - ref_logprobs`` of tokens sampled from the policy:

    ========= ======================= =====================================================================
    k1        ``d``                   unbiased, high variance, may be negative
    k2        ``d^2 / 2``             biased, low variance, never negative
    k3        ``exp(-d) - 1 + d``     unbiased, low variance, never negative
    abs       ``|d|``                 not a KL estimate; a distance that bounds k1 from above
    ========= ======================= =====================================================================

    John Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). "Unbiased" is a statement about
    the value. These formulas are for measuring and for rewards; their derivatives are not in general those of the
    KL, see :func:`rlhf_ray.losses.kl_loss`. The exponent of k3 is bounded by
    :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`, so k3 stays finite where the reference gives a token far
    more probability than the policy. Finite is not small: at ``d = -8`` k3 is 2,972 where k1 is -8 and k2 is 32, and as
    a reward one such token outweighs a batch. ``training.kl_clip`` bounds estimates in the reward.

    >>> policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    >>> kl(policy, reference, estimator="k1")
    tensor([ 0.6931, -0.6931])
    >>> kl(policy, reference, estimator="k3")
    tensor([0.1931, 0.3069])

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logprobs: The same tokens under the reference, the same shape.
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``.

    Returns:
        One estimate per token, in nats, the same shape, float32 (float64 if an input is). Nothing is masked: what lies
        under padding stays there.

    Raises:
        ValueError: The shapes differ, or the estimator is unknown.
    """
    if logprobs.shape != ref_logprobs.shape:
        shapes = f"logprobs {tuple(logprobs.shape)}, ref_logprobs {tuple(ref_logprobs.shape)}"
        raise ValueError(f"shapes differ: {shapes}")
    difference = widened(logprobs) - widened(ref_logprobs)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            # expm1 keeps the digits of nearby policies, where exp(x) - 1 would cancel. It may be off by its last digit
            # (CUDA promises 1 ulp), which near 0 could carry the difference below 0.
            log_ratio = (-difference).clamp(max=MAX_LOG_RATIO)
            return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)
        case "abs":
            return difference.abs()
    raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2, k3 or abs")


class AdaptiveKLController:
    """Raise the coefficient while the KL is above its target, lower it while it is below.

    An update after ``n`` completions with a mean KL of ``kl``::

        error = clip(kl / target - 1, -0.2, 0.2)
        coef  = coef * (1 + error * n / horizon)

    "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593), section 2.2. The paper multiplies the
    error by a constant gain of 0.1; ``n / horizon`` is that gain made independent of the batch size. A fixed
    coefficient needs no controller: it is a float.

    >>> controller = AdaptiveKLController(init_coef=0.5, target=4.0, horizon=100)
    >>> controller.update(kl=8.0, num_samples=50)
    >>> controller.coef
    0.55

    Args:
        init_coef: Coefficient before the first update, in reward per nat.
        target: KL to keep to, in nats, measured like the ``kl`` of :meth:`update` (summed over a completion, in
            the paper).
        horizon: Completions over which an error of 100% would double the coefficient, were errors not clipped.

    Raises:
        ValueError: An argument is not a positive, finite number.
    """

    def __init__(self, *, init_coef: float, target: float, horizon: float) -> None:
        _check_positive(init_coef=init_coef, target=target, horizon=horizon)
        self._coef = float(init_coef)
        self._target = target
        self._horizon = horizon

    @property
    def coef(self) -> float:
        """Coefficient of the penalty now, in reward per nat; always above 0."""
        return self._coef

    def update(self, kl: float, num_samples: int) -> None:
        """Take one step toward the target.

        Args:
            kl: Mean KL to the reference over the completions of the batch, in nats. An estimate may be negative.
            num_samples: Completions in the batch, over all ranks.

        Raises:
            ValueError: ``kl`` is not finite, ``num_samples`` is not positive, or it is 5 times ``horizon`` or more:
                the largest error would then carry the coefficient to 0, from where it cannot return, or below.
        """
        _check_positive(num_samples=num_samples)
        if not math.isfinite(kl):
            raise ValueError(f"kl = {kl}: must be finite")
        # Python floats: a half-precision scalar would make the coefficient one too, for good.
        kl, gain = float(kl), float(num_samples) / self._horizon
        if MAX_ERROR * gain >= 1.0:
            raise ValueError(f"num_samples = {num_samples}: must be below 5 * horizon = {5 * self._horizon}")
        error = min(max(kl / self._target - 1.0, -MAX_ERROR), MAX_ERROR)
        self._coef *= 1.0 + error * gain

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must hold: the coefficient. Target and horizon are settings."""
        return {"coef": self._coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: The coefficient is not a positive, finite number.
        """
        _check_positive(coef=state["coef"])
        self._coef = state["coef"]


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 < number < math.inf:
            raise ValueError(f"{name} = {number}: must be positive and finite")
