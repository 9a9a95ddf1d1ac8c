"""The model's last hidden states -> log-probabilities and entropies, without ``[tokens, V]``.

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

__all__ = ["chunked_logprobs_and_entropy", "sums_halves_in_float32"]

# Logits of a chunk in float32, of which two copies live: 1 GiB on a GPU, where the gradient of the weight is read and
# written once a chunk, and 128 MiB elsewhere.
_LOGITS_PER_CHUNK = {"cuda": 2**27}
_LOGITS_PER_CHUNK_ELSEWHERE = 2**24


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    entropy_gradient: bool = False,
    max_logits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``log softmax(x)`` at the targets and its entropy, with ``x = (hidden @ weight.T + bias) / temperature``.

    The same numbers as :func:`token_logprobs` and :func:`token_entropy` give on whole logits in float32, values and
    gradients. Products of half-precision operands are exact and summed in float32: on GPUs by the multiplication
    itself, which wants the gradient of the logits in half precision too; elsewhere by float32 copies of the operands.

    >>> hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    >>> logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([1, 1]))
    >>> logprobs.exp(), entropies  # e / (1 + e), 1 / 2; the second is ln 2
    (tensor([0.7311, 0.5000]), tensor([0.5822, 0.6931]))

    Args:
        hidden: ``[N, H]``, any floating dtype.
        weight: ``[V, H]``, of the output layer; where it differs in dtype, both are taken in the wider one.
        targets: ``[N]`` int64, ids in ``[0, V)``.
        bias: ``[V]``, of the output layer.
        temperature: The one that the tokens were sampled at, positive.
        with_entropy: Compute the entropies too.
        entropy_gradient: Whether these carry a gradient; without, they are for reports.
        max_logits: Logits made at once, at least those of one row; unset: by the memory of the device.

    Returns:
        Log-probabilities and entropies, ``[N]`` float32 (float64 where an operand is) each, in nats; None instead of
        the entropies when they were not asked for.

    Raises:
        ValueError: The shapes do not fit, or the temperature is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; expected [N, H], [V, H] and [N]")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be positive")
    if max_logits is None:
        max_logits = _LOGITS_PER_CHUNK.get(hidden.device.type, _LOGITS_PER_CHUNK_ELSEWHERE)
    rows = max(1, max_logits // weight.shape[0])
    with_entropy = with_entropy or entropy_gradient
    logprobs, entropies = _ChunkedLogprobs.apply(
        hidden, weight, bias, targets, temperature, with_entropy, entropy_gradient, rows
    )
    if not with_entropy:
        return logprobs, None
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
        with_entropy: bool,
        entropy_gradient: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        states, matrix = _operands(hidden, weight)
        logprobs = widened(states.new_empty(len(states)))
        entropies = torch.empty_like(logprobs)
        for part in _parts(len(states), rows):
            log_p = torch.log_softmax(_logits(states[part], matrix, bias, temperature), dim=-1)
            logprobs[part] = log_p.gather(-1, targets[part, None]).squeeze(-1)
            if with_entropy:
                p = log_p.exp_()
                entropies[part] = torch.special.entr(p, out=p).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.temperature, ctx.entropy_gradient, ctx.rows = temperature, entropy_gradient, rows
        return logprobs, entropies

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        states, matrix = _operands(hidden, weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums over all tokens: half precision would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=entropies.dtype) if ctx.needs_input_grad[2] else None
        for part in _parts(len(states), ctx.rows):
            of_token = grad_logprobs[part, None] / ctx.temperature
            x = _logits(states[part], matrix, bias, ctx.temperature)
            if ctx.entropy_gradient:
                log_p = torch.log_softmax(x, dim=-1)
                p = torch.exp(log_p, out=x)
                # A finite floor under the logarithms: 0 * -inf would be NaN.
                grad = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropies[part, None]).mul_(p)
                grad.mul_(grad_entropies[part, None] / ctx.temperature).addcmul_(p, of_token).neg_()
            else:
                grad = torch.softmax(x, dim=-1).mul_(-of_token)
            del x
            grad.scatter_add_(1, targets[part, None], of_token)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(states.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, states[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are multiplied: in half precision where the device sums such products in float32."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not (hidden.dtype == weight.dtype and _is_half(hidden) and sums_halves_in_float32(hidden.device)):
        dtype = torch.promote_types(dtype, torch.float32)
    return hidden.to(dtype), weight.to(dtype)


def sums_halves_in_float32(device: torch.device) -> bool:
    """Whether the device multiplies half-precision matrices into a float32 one."""
    return bool(device.type == "cuda")


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _logits(states: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """``[rows, V]`` float32 or float64, a tensor of its own."""
    logits = torch.mm(states, matrix.T, out_dtype=torch.float32) if _is_half(states) else states @ matrix.T
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a float32 or float64 matrix, without a second tensor of its size."""
    if _is_half(left):
        torch.addmm(target, left, right, out_dtype=torch.float32, out=target)
    else:
        target.addmm_(left, right)
