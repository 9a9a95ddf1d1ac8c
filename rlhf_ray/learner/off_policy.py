"""Log-probabilities of tokens that another policy sampled -> proximal policy and weights that correct for it.

That other policy is an earlier version, or what a quantized engine makes of the weights.

Decoupled PPO ("AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning",
arXiv:2505.24298): ratios are clipped against a proximal policy, and each loss is weighted by how much likelier that
policy makes the token than the policy that sampled it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.learner.credit import gathered_rows
from rlhf_ray.learner.estimates import Estimates
from rlhf_ray.losses import aggregate, behavior_weights, m2po_mask

__all__ = ["correction_weights", "effective_sample_size", "loglinear_proximal", "m2po_kept", "staleness_metrics"]


def loglinear_proximal(
    logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, staleness: torch.Tensor
) -> torch.Tensor:
    """Approximate log-probabilities under the policy before the update, without a forward pass of it.

    The policy that is trained is taken to be one version ahead of that policy, and the one that sampled a token
    ``s = staleness`` behind it. Log-probabilities are assumed to move evenly over versions::

        proximal = sampling + s / (s + 1) * (current - sampling)

    exact where ``s = 0``. No gradient passes. All ``[B, T]``, in nats and versions.
    """
    share = staleness / (staleness + 1.0)
    return sampling_logprobs + share * (logprobs.detach() - sampling_logprobs)


def correction_weights(
    training: TrainingSettings,
    proximal_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Weights of a microbatch's tokens and their metrics, as the settings ask; ``None``: data is not corrected.

    Tokens that are not ``kept`` have a weight of 0 and stay in the denominators. Of the metrics
    :func:`effective_sample_size` makes the batch's, which no mean over microbatches is.
    """
    masked = {} if kept is None else {"m2po_masked_fraction": aggregate(1.0 - kept.float(), mask, "token_mean")}
    if training.behavior_weights == "none":
        return None if kept is None else kept.float(), masked
    weights, metrics = behavior_weights(
        proximal_logprobs,
        sampling_logprobs,
        mask,
        level=training.behavior_weights,
        mode=training.behavior_mode,
        cap=training.behavior_cap,
        floor=training.behavior_floor,
    )
    del metrics["behavior_ess"]
    weights = weights if kept is None else weights * kept
    return weights, metrics | masked | {"behavior_weight_square_mean": aggregate(weights.square(), mask, "token_mean")}


def effective_sample_size(figures: dict[str, float]) -> dict[str, float]:
    """Replace the mean square of the weights by ``(sum w)^2 / (n * sum w^2)``, in place where there is one."""
    square = figures.pop("behavior_weight_square_mean", None)
    if square is not None:
        figures["effective_sample_size"] = figures["behavior_weight_mean"] ** 2 / square if square > 0.0 else 0.0
    return figures


def m2po_kept(estimates: Estimates, rows: torch.Tensor, *, threshold: float, group: dist.ProcessGroup) -> torch.Tensor:
    """Tokens of a minibatch that M2PO's trust region lets through, the same on any number of ranks.

    The policy before the update stands for the one that is trained, which it is in the first step.

    Args:
        estimates: The rank's batch, advantages included.
        rows: ``[B]`` the minibatch's sequences on this rank.
        threshold: Largest mean of the squared log-ratio, in square nats.
        group: A rank for each share of the batch.

    Returns:
        ``[B, T]`` bool.
    """
    assert estimates.advantages is not None
    return m2po_mask(
        estimates.proximal_logprobs[rows],
        estimates.sampling_logprobs[rows],
        estimates.advantages[rows],
        estimates.mask[rows],
        threshold=threshold,
        gather=lambda squares: gathered_rows(squares[:, None], group)[0][:, 0],
    )


def staleness_metrics(
    proximal_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    staleness: torch.Tensor,
    mask: torch.Tensor,
    num_by_staleness: Iterable[tuple[int, int]],
) -> list[tuple[dict[str, Any], float]]:
    """How far the sampling policy is from the proximal one, by version distance: means and numbers of tokens."""
    gaps = (proximal_logprobs - sampling_logprobs).abs()
    found = []
    for distance, tokens in num_by_staleness:
        mean = aggregate(gaps, mask & (staleness == distance), "token_mean")
        found.append(({f"proximal_logprob_diff_by_staleness/{distance}": mean}, float(tokens)))
    return found
