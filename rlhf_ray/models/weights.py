"""Properties of a transformers model that learners and reward models need: heads, finite weights, attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["caps_attention", "compute_heads_in_float32", "first_nonfinite", "heads"]


def caps_attention(model: PreTrainedModel) -> bool:
    """Whether attention logits have a soft cap, which transformers drops silently under SDPA, its default."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def heads(model: PreTrainedModel) -> list[nn.Module]:
    """Modules on top of the backbone that have weights of their own: an output layer that is not tied, a score."""
    backbone = getattr(model, model.base_model_prefix, None)
    if backbone is None:
        return []
    tied = {id(parameter) for parameter in backbone.parameters()}
    on_top = {module: [id(one) for one in module.parameters()] for module in model.children() if module is not backbone}
    return [module for module, own in on_top.items() if own and tied.isdisjoint(own)]


def compute_heads_in_float32(model: PreTrainedModel) -> None:
    """Keep what a (whole) model answers from being rounded to the type that its backbone computes in."""
    for head in heads(model):
        head.float().register_forward_pre_hook(_in_float32)


def first_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> str | None:
    """The name of the first tensor that holds NaN or infinity; ``None``: all are finite.

    Args:
        tensors: Names and tensors.
        dtype: Take the numbers as they are in this type; ``None``: in their own.
    """
    names, finite = [], []
    for name, tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor.detach())  # One pass, and no copy of the tensor; NaN where one is in it.
            limit = torch.finfo(dtype or tensor.dtype).max
            names.append(name)
            finite.append((low >= -limit) & (high <= limit))
    answers = torch.stack([one.to(finite[0].device) for one in finite]).tolist() if finite else []
    return next((name for name, is_finite in zip(names, answers, strict=True) if not is_finite), None)


def _in_float32(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if torch.is_tensor(one) else one for one in inputs)
