"""Attention over packed rows that needs no package: PyTorch's flash attention by cumulative lengths.

transformers calls it by the name ``varlen``, with the lengths that :meth:`Microbatch.model_inputs` passes to the model.
No mask is registered under that name, so transformers builds none: what a mask says must reach the function as
arguments (:func:`unsupported`), and it raises on those that it does not honor. Where there is no kernel (CPUs, GPUs
before Ampere, float32, heads wider than 256) the same is computed sequence by sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.weights import caps_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["VARLEN", "flash_kernel", "register", "unsupported"]

VARLEN: Final = "varlen"
_WIDEST_HEAD = 256
_FIRST_CAPABILITY = (8, 0)
_HALF_PRECISION = (torch.bfloat16, torch.float16)
# What families pass to any attention and none computes with; cumulative lengths of keys are those of queries.
_WITHOUT_INFLUENCE = (
    *("cache_position", "cu_seq_lens_k", "max_length_k", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache"),
)


# Set by register(): a compiled layer reads a global, and could not look the kernel up.
_kernel: Callable[..., Tensor] | None = None


def flash_kernel() -> Callable[..., Tensor] | None:
    """PyTorch's kernel, where this version has it with all that is asked of it and this process's GPU runs it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"enable_gqa", "window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return None
    runs = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _FIRST_CAPABILITY
    return varlen_attn if runs else None


def register() -> None:
    """Make the function known to transformers, in this process, whose GPU is set."""
    from transformers import AttentionInterface

    global _kernel
    _kernel = flash_kernel()
    AttentionInterface.register(VARLEN, _attention)


def unsupported(model: PreTrainedModel, kernel: str) -> str | None:
    """Why a model's attention is not what it should be under ``sdpa`` or ``varlen``; ``None`` where it is.

    transformers checks some of it for ``sdpa``, nothing for a registered function, and drops soft caps silently.
    """
    if kernel in ("sdpa", VARLEN) and caps_attention(model):
        return "it caps attention logits"
    if kernel == VARLEN and not (model._supports_flash_attn and model._supports_sdpa):
        return "its attention needs masks, sinks or states"
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence.

    Args:
        module: The layer.
        query: ``[B, H, L, D]``.
        key: ``[B, H_kv, L, D]``.
        value: ``[B, H_kv, L, D_v]``.
        attention_mask: ``None``.
        dropout: 0.
        scaling: Of logits; ``None``: ``D ** -0.5``.
        sliding_window: Tokens that a token sees, itself included.
        is_causal: Not false.
        cu_seq_lens_q: ``[N + 1]`` int32, where each sequence begins in the one row, and its end; ``None``: each row is
            a sequence, padded on the right if at all.
        max_length_q: Tokens of the longest.
        others: Without influence.

    Returns:
        ``[B, L, H, D_v]``, and no weights.

    Raises:
        ConfigError: An argument asks for another kind of attention.
    """
    rows, _, length, width = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    of_another_kind = {
        "attention_mask": attention_mask is not None,
        "dropout": dropout != 0.0,
        "is_causal": not causal,
        "cached keys": key.shape[2] != length,
        "cu_seq_lens_q of several rows": cu_seq_lens_q is not None and rows != 1,
    } | {name: given is not None and name not in _WITHOUT_INFLUENCE for name, given in others.items()}
    if refused := [name for name, is_asked in of_another_kind.items() if is_asked]:
        remedy = f"{type(module).__name__} passes {', '.join(refused)}, which it does not honor; use sdpa or eager"
        raise ConfigError("model.attn_implementation", VARLEN, remedy)
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    # The kernel counts tokens before a token, and has a faster way where no window ends within a sequence.
    left = -1 if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    value_width = value.shape[-1]
    padded = -(-max(width, value_width) // 8) * 8  # Zeros change no product.
    attend: Callable[..., Tensor] = _sequence_by_sequence
    if _kernel is not None and _is_for_kernel(query, padded):
        attend = _kernel
    answer = attend(
        *(_with_width(tensor.transpose(1, 2).flatten(0, 1), padded) for tensor in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=width**-0.5 if scaling is None else scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return answer[..., :value_width].unflatten(0, (rows, length)).contiguous(), None


def _with_width(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return nn.functional.pad(tensor, (0, missing)) if missing else tensor  # Else a copy of the same.


def _is_for_kernel(query: Tensor, width: int) -> bool:
    return query.is_cuda and query.dtype in _HALF_PRECISION and width <= _WIDEST_HEAD


@torch.compiler.disable  # type: ignore[untyped-decorator]  # A graph for every count of sequences.
def _sequence_by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    *_: Any,
    window_size: tuple[int, int],
    **of_sdpa: Any,
) -> Tensor:
    """What ``varlen_attn`` computes, with its arguments, by SDPA; reads the lengths from the device."""
    lengths = cu_seq_q.diff().tolist()
    answers = []
    for q, k, v in zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True):
        length, mask = q.shape[1], None
        if 0 <= window_size[0] < length - 1:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance <= window_size[0])
        attend = nn.functional.scaled_dot_product_attention
        answers.append(attend(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, **of_sdpa)[0])
    return torch.cat(answers, dim=1).transpose(0, 1)
