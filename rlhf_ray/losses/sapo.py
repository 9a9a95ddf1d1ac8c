"""Log-probabilities and advantages -> SAPO's policy loss, with a soft gate instead of a clip."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.losses.aggregation import aggregate
from rlhf_ray.losses.policy_tokens import PolicyTokens

__all__ = ["sapo_loss"]


def sapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature_positive: float,
    temperature_negative: float,
    behavior_weights: Tensor | None = None,
    aggregation: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss whose gradient fades as the ratio leaves 1, in both directions, where a clip cuts it off.

    With ``ratio = exp(logprobs - old_logprobs)`` and ``tau = temperature_positive`` where A > 0, else
    ``temperature_negative``, per token::

        L = -4 / tau * sigmoid(tau * (ratio - 1)) * A
        L = behavior_weight * L         when behavior_weights are given

    "Soft Adaptive Policy Optimization" (arXiv:2511.20347). The gradient is ``-g * ratio * A * grad(logprobs)`` with
    the gate ``g = 4 * p * (1 - p)``, ``p = sigmoid(tau * (ratio - 1))``: 1 at ratio 1, as without a clip, and the
    narrower the larger ``tau``. The paper takes 1.0 and 1.05: a negative advantage lifts all tokens that were not
    sampled, so its gate is the narrower one. It averages tokens, then sequences:
    ``aggregation="seq_mean_token_mean"``. The loss's value is ``-2 / tau * A`` at ratio 1, where PPO's is ``-A``.

    The log-ratio is bounded from above by :data:`~rlhf_ray.advantages.ratio.MAX_LOG_RATIO`. Only ``logprobs`` gets
    a gradient.

    >>> old, new = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.75]]).log().requires_grad_()
    >>> tau = {"temperature_positive": 1.0, "temperature_negative": 1.05}
    >>> loss, _ = sapo_loss(new, old, torch.ones(1, 2), torch.ones(1, 2), **tau)
    >>> loss.backward()
    >>> new.grad  # -1 / 2, and at ratio 3, with p = 0.8808, -4 * 0.8808 * 0.1192 * 3 / 2
    tensor([[-0.5000, -0.6300]])

    Args:
        logprobs: ``[B, T]``, log-probabilities of the tokens under the policy being trained, in nats;
            computed in float32 when they are shorter.
        old_logprobs: ``[B, T]``, under the policy of which the loss stays near.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, True where a token counts.
        temperature_positive: Steepness of the gate, positive, at positive advantages.
        temperature_negative: The same at other advantages.
        behavior_weights: ``[B, T]``, weight of each token's loss, see :func:`behavior_weights`; None: 1.
        aggregation: See :func:`aggregate`.
        normalizer: The global denominator, see :func:`aggregate`.

    Returns:
        The loss, and ``approx_kl``, ``ratio_mean`` and ``ratio_max`` as in :func:`ppo_loss`. Where that counts
        clipped tokens, this has ``gate_mean``: the mean of ``g`` over this call's unmasked tokens, 1 when nothing
        is held back.

    Raises:
        ValueError: The shapes differ, or a temperature is not positive.
    """
    tokens = PolicyTokens.of(logprobs, old_logprobs, advantages, mask, behavior_weights)
    if not (temperature_positive > 0 and temperature_negative > 0):
        given = f"temperature_positive = {temperature_positive}, temperature_negative = {temperature_negative}"
        raise ValueError(f"{given}: must be positive")
    ratio = tokens.ratio()
    temperature = torch.full_like(tokens.advantages, temperature_negative)
    temperature = temperature.masked_fill(tokens.advantages > 0, temperature_positive)
    passed = torch.sigmoid(temperature * (ratio - 1))
    gate = 4 * passed.detach() * (1 - passed.detach())
    losses = -4 / temperature * passed * tokens.advantages * tokens.weights
    metrics = tokens.metrics(ratio) | {"gate_mean": aggregate(gate, tokens.mask, "token_mean")}
    return aggregate(losses, tokens.mask, aggregation, normalizer), metrics
