"""Log-probabilities, advantages and returns -> the scalars that the learner minimizes.

Pure tensors. Every loss divides by a *global* denominator (``normalizer``), so that summing over microbatches and
ranks gives the loss and the gradient of the whole minibatch, however it was split.

Half precision may be given anywhere and is computed in float32. Results are float32, or float64 where an input is; a
gradient has the dtype of the input that it belongs to.
"""

from rlhf_ray.losses.aggregation import aggregate, global_normalizer
from rlhf_ray.losses.behavior_weights import behavior_weights
from rlhf_ray.losses.chunked_logprobs import chunked_logprobs_and_entropy
from rlhf_ray.losses.cispo import cispo_loss
from rlhf_ray.losses.gmpo import gmpo_loss
from rlhf_ray.losses.gspo import gspo_loss
from rlhf_ray.losses.logprobs import token_entropy, token_logprobs, token_logprobs_and_entropy
from rlhf_ray.losses.m2po import m2po_mask
from rlhf_ray.losses.ppo import ppo_loss
from rlhf_ray.losses.regularizers import entropy_bonus, kl_loss, likelihood_loss
from rlhf_ray.losses.sapo import sapo_loss
from rlhf_ray.losses.value import value_loss
from rlhf_ray.losses.value_bins import expected_value, hl_gauss_loss

__all__ = [
    "aggregate",
    "behavior_weights",
    "chunked_logprobs_and_entropy",
    "cispo_loss",
    "entropy_bonus",
    "expected_value",
    "global_normalizer",
    "gmpo_loss",
    "gspo_loss",
    "hl_gauss_loss",
    "kl_loss",
    "likelihood_loss",
    "m2po_mask",
    "ppo_loss",
    "sapo_loss",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "value_loss",
]
