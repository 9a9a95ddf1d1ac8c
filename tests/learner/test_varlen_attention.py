from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import APART_BY_VARLEN, NOT_TRIED, causal_families, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner import varlen_attention as module
from rlhf_ray.learner.models import _first_kernel
from rlhf_ray.learner.varlen_attention import _attention, _sequence_by_sequence

LENGTHS = [9, 45, 1, 3]  # Tiny models have windows of 32 tokens.
# Windows, soft caps, sinks, convolutions, latent attention, heads of several widths, classes by kernel, own masks.
IN_EVERY_RUN = (
    "qwen2",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "lfm2",
    "deepseek_v3",
    "afmoe",
    "falcon",
    "llama4",
)
FAMILIES = [
    pytest.param(family, marks=() if family in IN_EVERY_RUN else pytest.mark.slow)
    for family in causal_families()
    if family not in NOT_TRIED
]


def by_definition(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Softmax over the whole square, with minus infinity outside of a token's own sequence and window."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position = torch.arange(len(sequence))
    distance = position[:, None] - position
    seen = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (window or len(position)))
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def tensors(heads: int = 4, key_heads: int = 2, width: int = 16, value_width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (key_heads, width), (key_heads, value_width))
    return [torch.randn(1, count, sum(LENGTHS), size, generator=generator).requires_grad_() for count, size in shapes]


def packed(**changed: Any) -> dict[str, Any]:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS),
        "max_length_k": 45,
        **changed,
    }


@pytest.mark.parametrize("window", [None, 5, 45])
@pytest.mark.parametrize(
    "sizes", [(4, 2, 16, 16), (4, 4, 16, 16), (4, 1, 12, 20), (2, 2, 24, 8)], ids=["gqa", "mha", "odd", "latent"]
)
def test_each_sequence_sees_itself_alone(sizes: tuple[int, ...], window: int | None) -> None:
    query, key, value = tensors(*sizes)
    weights = torch.randn(1, sum(LENGTHS), sizes[0], sizes[3])

    answer, _ = _attention(nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, **packed())
    expected = by_definition(query, key, value, 0.3, window)

    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)
    mine = torch.autograd.grad((answer * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def test_rows_without_lengths_are_sequences() -> None:
    query, key, value = (tensor.detach() for tensor in tensors())
    rows = [tensor.repeat(3, 1, 1, 1) for tensor in (query, key, value)]

    answer, _ = _attention(nn.Module(), *rows, None)

    causal = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(answer, causal.transpose(1, 2).expand(3, -1, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "passed"), [(None, (-1, 0)), (5, (4, 0)), (45, (-1, 0))])
def test_the_kernel_of_gpus_is_called_as_it_documents(
    window: int | None, passed: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.varlen import varlen_attn

    calls: list[dict[str, Any]] = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        query, key, value, starts, same, longest, _ = args
        assert (query.shape, key.shape, value.shape) == ((58, 4, 16), (58, 2, 16), (58, 2, 16))
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert starts is same
        assert (starts.dtype, longest) == (torch.int32, 45)
        on_meta = [one.to("meta") if torch.is_tensor(one) else one for one in args]
        assert varlen_attn(*on_meta, **kwargs).shape == query.shape
        return _sequence_by_sequence(*args, **kwargs)

    query, key, value = tensors(width=12, value_width=10)
    expected = by_definition(query, key, value, 12**-0.5, window)
    monkeypatch.setattr(module, "_is_for_kernel", lambda query, width: width == 16)
    monkeypatch.setattr(module, "_kernel", kernel)

    answer, _ = _attention(nn.Module(), query, key, value, None, sliding_window=window, **packed())

    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)
    assert calls == [{"scale": 12**-0.5, "window_size": passed, "enable_gqa": True}]


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_it_computes_the_same(window: int | None) -> None:
    compiled = torch.compile(_attention, backend="aot_eager", dynamic=True)
    query, key, value = tensors()

    answer, _ = compiled(nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, **packed())
    gradients = torch.autograd.grad(answer.square().sum(), (query, key, value))

    expected = by_definition(query, key, value, 0.3, window)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_the_kernel_has_half_precision_and_heads_up_to_its_limit() -> None:
    class OnGpu:
        is_cuda = True
        dtype = torch.bfloat16

    assert module._is_for_kernel(OnGpu(), 256)  # type: ignore[arg-type]
    assert not module._is_for_kernel(OnGpu(), 264)  # type: ignore[arg-type]
    OnGpu.dtype = torch.float32
    assert not module._is_for_kernel(OnGpu(), 64)  # type: ignore[arg-type]
    assert not module._is_for_kernel(torch.zeros(1, dtype=torch.bfloat16), 64)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"attention_mask": torch.ones(1, 1, 58, 58)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"of_the_future": 1}, "of_the_future"),
    ],
)
def test_what_is_not_honored_is_refused(changed: dict[str, Any], named: str) -> None:
    query, key, value = tensors()
    arguments = packed(attention_mask=None, softcap=None, s_aux=None, position_ids=torch.arange(58), use_cache=False)

    _attention(nn.Module(), query, key, value, **arguments)
    with pytest.raises(ConfigError, match=f"Module passes {named}, which") as caught:
        _attention(nn.Module(), query, key, value, **arguments | changed)
    assert caught.value.field == "model.attn_implementation"


def test_lengths_belong_to_one_row() -> None:
    rows = [tensor.repeat(2, 1, 1, 1) for tensor in tensors()]
    with pytest.raises(ConfigError, match="cu_seq_lens_q of several rows"):
        _attention(nn.Module(), *rows, None, **packed())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_a_family_that_may_use_it_computes_as_with_eager_attention(family: str) -> None:
    torch.manual_seed(0)
    config: PretrainedConfig = tiny_config(family)
    if _first_kernel(AutoModelForCausalLM, config, ("varlen", "eager"), False) == "eager":
        assert family not in APART_BY_VARLEN
        return
    model = AutoModelForCausalLM.from_config(config, attn_implementation="varlen").eval()
    for parameter in model.parameters():
        # Fresh weights are so small that attention would hardly show.
        torch.nn.init.normal_(parameter, std=0.15) if parameter.ndim > 1 else None
    ids = [torch.randint(0, 200, (length,)) for length in LENGTHS]
    positions = [torch.arange(length) for length in LENGTHS]

    def logits(ids: Tensor, positions: Tensor, **lengths: Any) -> Tensor:
        answer: Tensor = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **lengths).logits[0]
        return answer

    def one_by_one() -> Tensor:
        return torch.cat([logits(*sequence) for sequence in zip(ids, positions, strict=True)])

    try:
        alone = one_by_one()
    except ConfigError:  # Encoders, which no learner loads.
        assert family not in APART_BY_VARLEN
        return
    in_one_row = logits(torch.cat(ids), torch.cat(positions), **packed())
    model.set_attn_implementation("eager")
    expected = one_by_one()

    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=5e-5)
    is_apart = torch.allclose(in_one_row, expected, rtol=1e-5, atol=5e-5)
    assert is_apart == (family in APART_BY_VARLEN)
