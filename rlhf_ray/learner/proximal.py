"""Where log-probabilities under the policy before the update come from: ratios are clipped against that policy.

Decoupled PPO ("AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning",
arXiv:2505.24298) tells this *proximal* policy from the one that sampled.
"""

from __future__ import annotations

import torch

from rlhf_ray.learner.estimates import Estimates, gather_rows, scatter_rows
from rlhf_ray.learner.layout import Microbatch

__all__ = ["LoglinearProximal", "RecomputedProximal", "loglinear_proximal"]


class RecomputedProximal:
    """A forward pass before the first step; of what the first step reads, that step's own pass gives the same.

    Args:
        like: ``[N, T]`` of the batch.
        needed_before: Whether all numbers are needed before the first step, as for a KL in the reward.

    Attributes:
        logprobs: ``[N, T]``, what passes have given so far.
    """

    def __init__(self, like: torch.Tensor, *, needed_before: bool) -> None:
        self.logprobs = torch.zeros_like(like)
        self._needed_before = needed_before

    def needs_pass(self, *, first: bool) -> bool:
        """Whether a forward pass must be made before the first step, over what it (``first``) or another one reads."""
        return self._needed_before or not first

    def put(self, micro: Microbatch, logprobs: torch.Tensor) -> None:
        """Take what such a pass gave."""
        scatter_rows(self.logprobs, micro, logprobs)

    def of_step(self, micro: Microbatch, logprobs: torch.Tensor, known: Estimates, *, first: bool) -> torch.Tensor:
        """``[B, T]`` of a microbatch, given what is known of it and what the policy makes of it in a step."""
        if not self.needs_pass(first=first):
            self.put(micro, logprobs.detach())
        return gather_rows(self.logprobs, micro)


class LoglinearProximal(RecomputedProximal):
    """In the steps an approximation that takes no forward pass: see :func:`loglinear_proximal`."""

    def needs_pass(self, *, first: bool) -> bool:
        """As :meth:`RecomputedProximal.needs_pass`; steps need none."""
        return self._needed_before

    def of_step(self, micro: Microbatch, logprobs: torch.Tensor, known: Estimates, *, first: bool) -> torch.Tensor:
        """Between the policy that sampled and the one that is trained."""
        return loglinear_proximal(logprobs, known.sampling_logprobs, known.staleness)


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
