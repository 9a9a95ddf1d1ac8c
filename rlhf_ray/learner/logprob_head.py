"""The policy's output layer on a learner rank: answers with log-probabilities of given tokens instead of logits.

The layer runs inside the model's own forward pass, where FSDP has gathered its weights, and sees the hidden states of
the tokens that enter the losses alone. Whole logits, ``[tokens, V]``, never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.learner.lora import adapters_off
from rlhf_ray.learner.models import reshard
from rlhf_ray.losses import (
    chunked_logprobs_and_entropy,
    token_entropy,
    token_logprobs,
    token_logprobs_and_entropy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LogprobHead", "Question", "TokenScorer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which tokens' log-probabilities are wanted."""

    rows: Tensor
    """``[N]`` where the states before them lie among the flattened hidden states that reach the layer."""
    targets: Tensor
    """``[N]`` the tokens."""
    temperature: float
    entropy_gradient: bool


class LogprobHead(nn.Linear):  # type: ignore[misc]
    """A linear layer that, while asked, returns ``[N, 2]``: log-probability and entropy of each token asked for.

    It computes in float32 whatever reaches it: logits in bfloat16 would be rounded to 8 bits. A weight that is tied to
    the embedding is the one that :func:`rlhf_ray.learner.models.shard` gathers, in the type of the other layers.
    """

    _question: Question | None

    @classmethod
    def adopt(cls, model: PreTrainedModel) -> LogprobHead | None:
        """Turn a model's output layer into one before it is sharded, with the same weights under the same names.

        Returns:
            The layer, which answers where :meth:`can_answer`; ``None`` where it is not a plain linear one.
        """
        layer = model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            return None
        layer._question = None
        layer.__class__ = cls
        assert isinstance(layer, cls)
        return layer

    def forward(self, hidden: Tensor) -> Tensor:
        """Answer the question that is open, or give logits."""
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        question = self._question
        if question is None:
            return nn.functional.linear(hidden.float(), weight, bias)
        answers = chunked_logprobs_and_entropy(
            hidden.flatten(0, -2)[question.rows].float(),
            weight,
            question.targets,
            bias=bias,
            temperature=question.temperature,
            entropy_gradient=question.entropy_gradient,
        )
        return torch.stack(answers, dim=-1)

    @contextmanager
    def asked(self, question: Question) -> Iterator[None]:
        """Within, a forward pass of the model returns the answer as its ``logits``."""
        self._question = question
        try:
            yield
        finally:
            self._question = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def can_answer(
        self, model: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype = torch.float32
    ) -> bool:
        """Whether the (sharded) model's logits are a linear function of its last hidden states; a collective.

        Where they are not (soft caps, scales) the plain way remains. Nothing in a configuration tells: both ways are
        compared on a few tokens.

        Args:
            model: The layer's model; all ranks call this in step.
            device: Where it computes.
            compute_dtype: And in what.
        """
        tolerance = 1e-4 if compute_dtype == torch.float32 else 2e-2
        ids = (torch.arange(8, device=device) % self.out_features)[None, :]
        rows = torch.arange(7, device=device)
        question = Question(rows=rows, targets=ids[0, 1:], temperature=1.0, entropy_gradient=False)
        logits = model(input_ids=ids, use_cache=False).logits
        try:
            with self.asked(question):
                answer = model(input_ids=ids, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, IndexError):  # The model reshapes its logits.
            if isinstance(model, FSDPModule):
                model.reset_iter_state()  # After half a pass reshard() would leave the root gathered.
            return False
        finally:
            reshard(model)
        if logits.ndim != 3 or answer.shape != (7, 2):
            return False
        expected = token_logprobs_and_entropy(logits[0, :-1], ids[0, 1:])
        return all(
            torch.allclose(given.float(), wanted.float(), atol=tolerance)
            for given, wanted in zip(answer.unbind(-1), expected, strict=True)
            if wanted is not None
        )


class TokenScorer:
    """A causal language model that tells how likely each completion token of a microbatch is.

    Args:
        model: The (sharded) model.
        head: Its output layer, adopted; ``None``: go through whole logits.
        temperature: Sampling temperature.
        without_adapters: Whether LoRA adapters are switched off: the policy as it was before training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: LogprobHead | None,
        *,
        temperature: float,
        without_adapters: bool = False,
    ) -> None:
        self.model = model
        self._adapters = adapters_off if without_adapters else nullcontext
        self._head = head
        self._temperature = temperature

    def initial(self) -> TokenScorer:
        """The same model without its adapters."""
        return TokenScorer(self.model, self._head, temperature=self._temperature, without_adapters=True)

    def __call__(self, micro: Microbatch, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, ``[B, T]`` float32 each in nats, 0 outside ``micro.mask``.

        The entropies carry a gradient only with ``entropy_gradient``.
        """
        # An empty microbatch asks for one token and throws the answer away: other ranks' collectives need a partner.
        is_empty = not micro.mask.any()
        rows = micro.completion_index.flatten()[:1] if is_empty else micro.completion_index[micro.mask]
        targets = micro.targets.flatten()[rows]
        if self._head is None:
            logits = self._logits(micro).flatten(0, -2)[rows]
            logprobs = token_logprobs(logits, targets, temperature=self._temperature)
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                entropies = token_entropy(logits, temperature=self._temperature)
        else:
            question = Question(
                rows=rows, targets=targets, temperature=self._temperature, entropy_gradient=entropy_gradient
            )
            with self._head.asked(question):
                logprobs, entropies = self._logits(micro).unbind(-1)
        if not entropy_gradient:
            entropies = entropies.detach()
        if is_empty:
            logprobs, entropies = 0.0 * logprobs, 0.0 * entropies
            return logprobs.expand(micro.mask.shape), entropies.expand(micro.mask.shape)
        return _spread(logprobs, micro.mask), _spread(entropies, micro.mask)

    def _logits(self, micro: Microbatch) -> Tensor:
        inputs = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "logits_to_keep": micro.kept}
        with self._adapters(self.model):
            output = self.model(**inputs, **micro.attention, use_cache=False)
        logits: Tensor = output.logits
        return logits


def _spread(answers: Tensor, mask: Tensor) -> Tensor:
    """``[N]`` to where the mask is true in ``[B, T]``, zeros elsewhere."""
    spread = answers.new_zeros(mask.shape)
    spread[mask] = answers
    return spread
