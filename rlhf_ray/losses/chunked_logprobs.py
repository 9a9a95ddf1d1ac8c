"""Stage 5 of the loop: the model's last hidden states -> log-probabilities and entropies, without ``[tokens, V]``.

With a vocabulary of 128k one float32 row of logits takes half a megabyte, and a plain backward pass holds several
copies of all rows: gigabytes for a few thousand tokens. Here the logits of a few rows at a time are made, used and
dropped, and made again in the backward pass: one more matrix product against that memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ray.advantages.padding import widened

__all__ = ["chunked_logprobs_and_entropy"]

# Logits in memory at once, over all rows of a chunk: 64 MiB in float32, of which up to four copies live.
_LOGITS_A_CHUNK = 2**24


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    max_logits: int = _LOGITS_A_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return ``log softmax(x)`` at the targets and its entropy, with ``x = (hidden @ weight.T + bias) / temperature``.

    The same numbers as :func:`token_logprobs` and :func:`token_entropy` give on whole logits, values and gradients.

    >>> hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    >>> logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([1, 1]))
    >>> logprobs.exp(), entropies  # e / (1 + e), 1 / 2; the second is ln 2
    (tensor([0.7311, 0.5000]), tensor([0.5822, 0.6931]))

    Args:
        hidden: ``[N, H]``, any floating dtype; the product is taken in it.
        weight: ``[V, H]``, of the output layer.
        targets: ``[N]`` int64, ids in ``[0, V)``.
        bias: ``[V]``, of the output layer.
        temperature: The one that the tokens were sampled at, positive.
        entropy_gradient: Whether the entropies carry a gradient; without, they are for reports.
        max_logits: Logits made at once; at least one row is.

    Returns:
        Log-probabilities and entropies, ``[N]`` float32 (float64 where ``hidden`` is) each, in nats.

    Raises:
        ValueError: The shapes do not fit, or the temperature is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [N, H], [V, H] and [N]")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    rows = max(1, max_logits // weight.shape[0])
    logprobs, entropies = _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, entropy_gradient, rows)
    return logprobs, entropies if entropy_gradient else entropies.detach()


class _ChunkedLogprobs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy_gradient: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = widened(hidden.new_empty(len(hidden)))
        entropies, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for part in _parts(len(hidden), rows):
            x = _scaled(hidden[part], weight, bias, temperature)
            normalizers[part] = torch.logsumexp(x, dim=-1)
            logprobs[part] = x.gather(-1, targets[part, None]).squeeze(-1) - normalizers[part]
            probabilities = torch.softmax(x, dim=-1)
            # A finite floor under the logits: 0 * -inf would be NaN.
            x.clamp_(min=torch.finfo(x.dtype).min)
            entropies[part] = normalizers[part] - torch.linalg.vecdot(probabilities, x)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies)
        ctx.temperature, ctx.entropy_gradient, ctx.rows = temperature, entropy_gradient, rows
        return logprobs, entropies

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Sums over all tokens: half precision would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=normalizers.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=normalizers.dtype)
        for part in _parts(len(hidden), ctx.rows):
            x = _scaled(hidden[part], weight, bias, ctx.temperature)
            p = torch.softmax(x, dim=-1)
            grad = p * -of_logprobs[part, None]
            grad.scatter_add_(1, targets[part, None], of_logprobs[part, None])
            if ctx.entropy_gradient:
                x.clamp_(min=torch.finfo(x.dtype).min).sub_((normalizers - entropies)[part, None])
                grad -= p.mul_(x).mul_(of_entropies[part, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if hidden.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, hidden[part])  # Without a second tensor of this size.
            else:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += widened(grad).sum(dim=0)
        if bias is not None and grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _scaled(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """``[rows, V]`` float32 or float64, a tensor of its own."""
    logits = widened(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1.0 else logits.div_(temperature)
