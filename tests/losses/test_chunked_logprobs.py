from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_ray.losses import chunked_logprobs_and_entropy, token_logprobs_and_entropy

Pair = tuple[Tensor, Tensor]


def case(*, rows: int = 23, hidden: int = 8, vocabulary: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(rows, hidden, generator=generator),
        torch.randn(vocabulary, hidden, generator=generator) / math.sqrt(hidden),
        torch.randn(vocabulary, generator=generator),
        torch.randint(0, vocabulary, (rows,), generator=generator),
    )


def gradients(score: Callable[[Tensor, Tensor, Tensor], Pair], *, entropy: bool) -> tuple[Pair, list[Tensor]]:
    """Values, and the gradients of a mean of random weights as a loss takes it."""
    hidden, weight, bias, _ = case()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropies = score(*leaves)
    weights = torch.linspace(-1.0, 1.0, len(hidden))
    total = (logprobs * weights).mean()
    if entropy:
        total = total + (entropies * weights.flip(0)).mean()
    total.backward()
    return (logprobs.detach(), entropies.detach()), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows_a_chunk", [1, 5, 23, 1000])
def test_values_and_gradients_are_those_of_whole_logits(rows_a_chunk: int, temperature: float, entropy: bool) -> None:
    targets = case()[3]

    def chunked(hidden: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        return chunked_logprobs_and_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            entropy_gradient=entropy,
            max_logits=rows_a_chunk * len(weight),
        )

    def whole(hidden: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logprobs, entropies = token_logprobs_and_entropy(logits, targets, temperature=temperature)
        assert entropies is not None
        return logprobs, entropies

    values, grads = gradients(chunked, entropy=entropy)
    expected, expected_grads = gradients(whole, entropy=entropy)

    for given, wanted in zip((*values, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert len(grads) == 3


def test_numbers_by_hand() -> None:
    # Logits ln 1, ln 3 for the one row, and 0, 0 for the other.
    hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([0, 1]))

    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.25, 0.5]))
    by_hand = [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), math.log(2.0)]
    torch.testing.assert_close(entropies, torch.tensor(by_hand))


def test_entropies_carry_no_gradient_unless_asked_for() -> None:
    hidden, weight, _, targets = case()
    _, entropies = chunked_logprobs_and_entropy(hidden.requires_grad_(), weight, targets)

    assert not entropies.requires_grad


def test_half_precision_gives_float32_near_the_exact() -> None:
    hidden, weight, _, targets = case()
    halves = chunked_logprobs_and_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    wholes = chunked_logprobs_and_entropy(hidden, weight, targets)

    for given, wanted in zip(halves, wholes, strict=True):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, wanted, atol=0.05, rtol=0.02)


def test_gradients_keep_the_dtype_of_what_they_belong_to() -> None:
    hidden, weight, _, targets = case()
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    chunked_logprobs_and_entropy(hidden, weight, targets, max_logits=1)[0].sum().backward()

    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_logits_as_large_as_half_precision_allows_stay_finite() -> None:
    hidden = torch.tensor([[65504.0], [-65504.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([0, 0]), entropy_gradient=True)
    (logprobs.sum() + entropies.sum()).backward()

    assert logprobs.tolist() == [0.0, -2 * 65504.0]
    assert entropies.tolist() == [0.0, 0.0]
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


def test_a_token_of_probability_zero_leaves_the_entropy_finite() -> None:
    hidden, weight = torch.ones(1, 1), torch.zeros(3, 1)
    bias = torch.tensor([0.0, 0.0, -math.inf])
    _, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([0]), bias=bias)

    torch.testing.assert_close(entropies, torch.tensor([math.log(2.0)]))


def test_no_token_is_no_error() -> None:
    logprobs, entropies = chunked_logprobs_and_entropy(
        torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64)
    )

    assert logprobs.shape == entropies.shape == (0,)


@pytest.mark.parametrize(
    "hidden, weight, targets, temperature, message",
    [
        ((2, 4), (5, 3), 2, 1.0, "shapes do not fit"),
        ((2, 4), (5, 4), 3, 1.0, "shapes do not fit"),
        ((2, 1, 4), (5, 4), 2, 1.0, "shapes do not fit"),
        ((2, 4), (5, 4), 2, 0.0, "temperature = 0.0"),
    ],
)
def test_bad_input(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: int, temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_logprobs_and_entropy(
            torch.zeros(hidden),
            torch.zeros(weight),
            torch.zeros(targets, dtype=torch.int64),
            temperature=temperature,
        )
