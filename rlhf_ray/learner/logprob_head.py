"""The policy's output layer on a learner rank: answers with log-probabilities of given tokens instead of logits.

The layer is called within one forward pass of the model, where FSDP has gathered its weights, with the hidden states
before the tokens that enter the losses alone. Whole logits, ``[tokens, V]``, never exist.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.learner.lora import adapters_off
from rlhf_ray.learner.mesh import gather_objects
from rlhf_ray.learner.models import reshard
from rlhf_ray.losses import chunked_logprobs_and_entropy, token_entropy, token_logprobs, token_logprobs_and_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_ray.learner.sequence_parallel import SequenceSlices

__all__ = ["LogprobHead", "TokenScorer", "usable_head"]

_LOG = logging.getLogger(__name__)
# Of log-probabilities of the same rows, whose hidden states are equal but for what two passes differ by.
_TOLERANCE, _TOLERANCE_IN_HALF_PRECISION = 1e-4, 2e-3


class LogprobHead(nn.Linear):  # type: ignore[misc]
    """A linear layer that gives logits, or log-probabilities and entropies of given tokens, in float32 each.

    Logits in bfloat16 would be rounded to 8 bits. A weight that is tied to the embedding is the one that
    :func:`rlhf_ray.learner.models.shard` gathers, in the type of the other layers.
    """

    @classmethod
    def adopt(cls, model: PreTrainedModel) -> LogprobHead | None:
        """Put one in the place of a model's output layer before it is sharded, with its weights under their names.

        Returns:
            The layer, of which :func:`usable_head` says whether it may be used; ``None`` where the model's is not a
            plain linear one.
        """
        layer = model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            return None
        head = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        owner, name = next(
            (owner, name) for owner in model.modules() for name, one in owner.named_children() if one is layer
        )
        setattr(owner, name, head)
        return head

    def forward(
        self,
        states: Tensor,
        targets: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
        entropy_gradient: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits of ``[..., H]``; of ``[N, H]`` and targets what :func:`chunked_logprobs_and_entropy` gives."""
        if targets is None:
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(states.float(), self.weight.float(), bias)
        return chunked_logprobs_and_entropy(
            states,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
        )


def usable_head(
    model: PreTrainedModel, head: LogprobHead | None, device: torch.device, compute_dtype: torch.dtype = torch.float32
) -> LogprobHead | None:
    """Let the (sharded) model score tokens by its head, where that gives what its logits do; a collective.

    Elsewhere (soft caps, scales) the way through whole logits remains, and the log says so. Nothing in a configuration
    tells: both ways are compared on a few tokens.

    Args:
        model: All ranks call this in step.
        head: What :meth:`LogprobHead.adopt` gave of it.
        device: Where it computes.
        compute_dtype: And in what.

    Returns:
        The head; ``None`` where it may not be used.
    """
    if head is None:
        reason: str | None = f"its output layer is of type {type(model.get_output_embeddings()).__name__}"
    else:
        model.score_tokens = MethodType(_score_tokens, model)
        # FSDP gathers what no unit of its own holds in what it knows as a forward pass.
        register_fsdp_forward_method(model, "score_tokens")
        reason = _difference(model, head, device, compute_dtype)
    if dist.is_initialized():  # Where one rank goes another way than the others, collectives never end.
        reason = next((one for one in gather_objects(reason) if one is not None), None)
    if reason is None:
        return head
    if not dist.is_initialized() or dist.get_rank() == 0:
        _log_once(f"{type(model).__name__}: log-probabilities take whole logits, more memory: {reason}")
    return None


@cache
def _log_once(message: str) -> None:
    _LOG.warning(message)


def _score_tokens(
    model: PreTrainedModel, head: LogprobHead, inputs: dict[str, Any], rows: Tensor, targets: Tensor, **asked: Any
) -> tuple[Tensor, Tensor | None]:
    """A forward pass of the model that ends in :meth:`LogprobHead.forward`, as ``asked``.

    Args:
        model: The model, whose method this becomes.
        head: Its output layer.
        inputs: Of the backbone.
        rows: ``[N]`` where the states before the tokens lie among the flattened hidden states.
        targets: ``[N]`` the tokens.
        asked: Keywords of the head.
    """
    hidden = getattr(model, model.base_model_prefix)(**inputs)[0]
    answers: tuple[Tensor, Tensor | None] = head(hidden.flatten(0, -2).index_select(0, rows), targets, **asked)
    return answers


@torch.no_grad()  # type: ignore[untyped-decorator]
def _difference(
    model: PreTrainedModel, head: LogprobHead, device: torch.device, compute_dtype: torch.dtype
) -> str | None:
    """Why the head does not give what the model's logits do; ``None``: it does."""
    ids = torch.arange(8, device=device) % head.out_features
    targets = ids.roll(-1)
    # Twice: routers of experts may differ by rounding from pass to pass.
    logits, again = (model(input_ids=ids[None], use_cache=False).logits for _ in range(2))
    try:
        inputs = {"input_ids": ids[None], "use_cache": False}
        answers = model.score_tokens(head, inputs, torch.arange(8, device=device), targets)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(model, FSDPModule):
            model.reset_iter_state()  # After half a pass reshard() would leave the root gathered.
        return f"its backbone and output layer cannot be called one after the other ({type(error).__name__}: {error})"
    finally:
        reshard(model)
    if logits.shape != (1, 8, head.out_features):
        return f"its logits are of shape {tuple(logits.shape)}"
    wanted, noisy = (torch.stack(token_logprobs_and_entropy(one[0], targets)) for one in (logits, again))
    given = torch.stack(answers)
    tolerance = _TOLERANCE if compute_dtype == torch.float32 else _TOLERANCE_IN_HALF_PRECISION
    difference = float((given - wanted).abs().max())
    if difference <= tolerance + 4.0 * float((noisy - wanted).abs().max()):
        return None
    return f"its logits are not its output layer's product with the last hidden states, by up to {difference:.2g} nats"


@dataclass(frozen=True, slots=True)
class TokenScorer:
    """A causal language model that tells how likely each completion token of a microbatch is."""

    model: PreTrainedModel
    """Sharded."""
    head: LogprobHead | None
    """What :func:`usable_head` gave; ``None``: go through whole logits."""
    temperature: float
    """Of sampling."""
    slices: SequenceSlices | None = None
    """Those that this rank reads of sequences, of a model that was adopted; a call is a collective then."""
    without_adapters: bool = False
    """Whether LoRA adapters are switched off: the policy as it was before training."""

    def __call__(self, micro: Microbatch, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, ``[B, T]`` float32 each in nats, 0 outside ``micro.mask``.

        The entropies carry a gradient only with ``entropy_gradient``.
        """
        logprobs, entropies = self._scored(micro, with_entropy=True, entropy_gradient=entropy_gradient)
        return logprobs, entropies

    def logprobs(self, micro: Microbatch) -> Tensor:
        """The log-probabilities alone, with less work."""
        return self._scored(micro, with_entropy=False, entropy_gradient=False)[0]

    def _scored(self, micro: Microbatch, *, with_entropy: bool, entropy_gradient: bool) -> list[Tensor]:
        """``[B, T]`` log-probabilities, and entropies where they are asked for, of this rank's slice or all slices."""
        own = micro if self.slices is None else self.slices.shard(micro, self.model)
        answers = self._answers(own, with_entropy=with_entropy, entropy_gradient=entropy_gradient)
        scored = [_spread(one, own) for one in answers if one is not None]
        return scored if self.slices is None else list(self.slices.gather_tokens(torch.stack(scored)))

    def _answers(
        self, micro: Microbatch, *, with_entropy: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``[N]`` each, of the tokens that enter the losses.

        An empty microbatch asks for one token, whose answer :func:`_spread` throws away: other ranks' collectives need
        a partner.
        """
        places, targets = micro.scored, micro.targets
        if not len(places):
            places = targets = micro.scored.new_zeros(1)
        states, inputs = micro.value_index.flatten()[places], micro.model_inputs()
        with adapters_off(self.model) if self.without_adapters else nullcontext():
            if self.head is not None:
                answers: tuple[Tensor, Tensor | None] = self.model.score_tokens(
                    self.head,
                    inputs,
                    states,
                    targets,
                    temperature=self.temperature,
                    with_entropy=with_entropy,
                    entropy_gradient=entropy_gradient,
                )
                return answers
            logits = self.model(**inputs, logits_to_keep=micro.kept).logits
        length = micro.input_ids.shape[1]
        logits = logits[states // length, torch.searchsorted(micro.kept, states % length)]
        logprobs = token_logprobs(logits, targets, temperature=self.temperature)
        if not with_entropy:
            return logprobs, None
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            return logprobs, token_entropy(logits, temperature=self.temperature)


def _spread(answers: Tensor, micro: Microbatch) -> Tensor:
    """``[N]`` to where the mask is true in ``[B, T]``, zeros elsewhere; where it is nowhere, the answer times zero."""
    if not len(micro.scored):
        return (0.0 * answers).expand(micro.mask.shape)
    return answers.new_zeros(micro.mask.numel()).scatter(0, micro.scored, answers).view(micro.mask.shape)
