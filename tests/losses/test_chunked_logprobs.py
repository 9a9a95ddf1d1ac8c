from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_gradients_by_hand() -> None:
    # With a hidden state of 1 and weights of their logarithms the probabilities are 1/4 and 3/4; target 0. By the
    # logits, the log-probability has the gradient 1 - 1/4, -3/4, and the entropy H has -p (ln p + H); H = 0.562335,
    # ln p + H = -0.823959 and 0.274653. The weights' gradient is that of the logits; twice the entropy is taken.
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[0.25], [0.75]]).log().requires_grad_()
    logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([0]), entropy_gradient=True)
    (logprobs + 2 * entropies).sum().backward()

    assert weight.grad is not None
    by_hand = [0.75 + 2 * 0.205990, -0.75 - 2 * 0.205990]
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor(by_hand), rtol=0, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("sizes", [(23,), (1, 22), (5, 0, 11, 7)])
def test_microbatches_add_up_to_the_whole(sizes: tuple[int, ...], entropy: bool) -> None:
    targets = case()[3]

    def split(hidden: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        parts = [
            chunked_logprobs_and_entropy(rows, weight, ids, bias=bias, entropy_gradient=entropy, max_logits=100)
            for rows, ids in zip(hidden.split(sizes), targets.split(sizes), strict=True)
        ]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])

    def at_once(hidden: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        return chunked_logprobs_and_entropy(hidden, weight, targets, bias=bias, entropy_gradient=entropy)

    values, grads = gradients(split, entropy=entropy)
    expected, expected_grads = gradients(at_once, entropy=entropy)

    for given, wanted in zip((*values, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


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


def of_logits(logits: Tensor, targets: Tensor) -> tuple[Pair, Tensor]:
    """Values, and the gradient by a weight that holds these logits: each hidden state picks a row of them."""
    weight = logits.T.contiguous().requires_grad_()
    values = chunked_logprobs_and_entropy(
        torch.eye(len(logits), dtype=logits.dtype), weight, targets, entropy_gradient=True, max_logits=len(weight)
    )
    (values[0].sum() + values[1].sum()).backward()
    assert weight.grad is not None
    return values, weight.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_half_precision_logits_are_reduced_in_float32(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(6, 50, generator=generator)).to(dtype)
    targets = torch.randint(0, 50, (6,), generator=generator)
    (logprobs, entropies), gradient = of_logits(logits, targets)

    exact = logits.double().requires_grad_()
    log_softmax = torch.log_softmax(exact, dim=-1)
    wanted = log_softmax.gather(-1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)
    (wanted[0].sum() + wanted[1].sum()).backward()
    # A float32 near 1,000 has a spacing of 6e-5.
    torch.testing.assert_close(logprobs.double(), wanted[0].detach(), rtol=1e-6, atol=2e-4)
    torch.testing.assert_close(entropies.double(), wanted[1].detach(), rtol=1e-6, atol=2e-4)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.T.double(), exact.grad, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite_and_near_the_exact(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, 6e4, -6e4], [6e4, -6e4, 0.0], [-6e4, -6e4, -6e4], [6e4, 0.0, -6e4]], dtype=dtype)
    (logprobs, entropies), gradient = of_logits(logits, torch.tensor([0, 1, 2, 0]))

    # Two equal, the least likely, three equal, the only likely. A float32 near 6e4 has a spacing of 1/256.
    wanted = [-math.log(2.0), -2.0 * logits[0, 0].item(), -math.log(3.0), 0.0]
    torch.testing.assert_close(logprobs, torch.tensor(wanted), rtol=0, atol=1 / 256)
    torch.testing.assert_close(entropies, torch.tensor([math.log(2.0), 0.0, math.log(3.0), 0.0]), rtol=0, atol=1 / 256)
    # That of the entropy is 0 at each of these; that of a log-probability is 1 less the probability at the target.
    by_hand = [[0.5, -0.5, 0.0], [-1.0, 1.0, 0.0], [-1 / 3, -1 / 3, 2 / 3], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gradient.T.float(), torch.tensor(by_hand), rtol=0, atol=4e-3)


def test_a_token_of_probability_zero_leaves_the_entropy_finite() -> None:
    hidden, weight = torch.ones(1, 1), torch.zeros(3, 1)
    bias = torch.tensor([0.0, 0.0, -math.inf])
    _, entropies = chunked_logprobs_and_entropy(hidden, weight, torch.tensor([0]), bias=bias)

    torch.testing.assert_close(entropies, torch.tensor([math.log(2.0)]))


def test_a_token_of_probability_zero_gets_no_gradient_from_the_entropy() -> None:
    # The other two are equally likely, where the entropy has its maximum.
    hidden, weight = torch.ones(1, 1), torch.zeros(3, 1, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    logprobs, entropies = chunked_logprobs_and_entropy(
        hidden, weight, torch.tensor([0]), bias=bias, entropy_gradient=True
    )
    (logprobs + entropies).sum().backward()

    assert bias.grad is not None and weight.grad is not None
    torch.testing.assert_close(bias.grad, torch.tensor([0.5, -0.5, 0.0]))
    torch.testing.assert_close(weight.grad.flatten(), bias.grad)


def test_the_gradient_of_many_half_precision_tokens_keeps_the_small_ones() -> None:
    # Each token adds 1/2 to the weight of its target; a sum in bfloat16 would stay at 128, where the spacing is 1.
    hidden, weight = torch.ones(1000, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    bias = torch.zeros(2).bfloat16().requires_grad_()
    targets = torch.zeros(1000, dtype=torch.int64)
    chunked_logprobs_and_entropy(hidden, weight, targets, bias=bias, max_logits=2)[0].sum().backward()

    assert weight.grad is not None and weight.grad.flatten().tolist() == [500.0, -500.0]
    assert bias.grad is not None and bias.grad.tolist() == [500.0, -500.0]


def test_no_token_is_no_error() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    logprobs, entropies = chunked_logprobs_and_entropy(
        hidden, weight, torch.zeros(0, dtype=torch.int64), entropy_gradient=True
    )
    (logprobs.sum() + entropies.sum()).backward()

    assert logprobs.shape == entropies.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(5, 4))


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


def test_without_entropies_the_logprobs_are_the_same() -> None:
    hidden, weight, bias, targets = case()
    logprobs, entropies = chunked_logprobs_and_entropy(hidden, weight, targets, bias=bias, with_entropy=False)

    assert entropies is None
    assert torch.equal(logprobs, chunked_logprobs_and_entropy(hidden, weight, targets, bias=bias)[0])


class Shapes(TorchDispatchMode):
    """Counts the tensors of a shape and dtype that operations make, views and results in place left out."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.made, self._wanted = 0, (torch.Size(shape), dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.shape, result.dtype) == self._wanted:
            given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
            self.made += result.untyped_storage().data_ptr() not in given
        return result


def test_the_gradient_of_a_weight_that_is_not_trained_is_not_computed() -> None:
    hidden, weight, _, targets = case()
    with Shapes(*weight.shape, dtype=weight.dtype) as weights:
        chunked_logprobs_and_entropy(hidden.requires_grad_(), weight, targets)[0].sum().backward()

    assert hidden.grad is not None
    assert weights.made == 0


@pytest.fixture
def halves_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of half-precision matrices as GPUs have them: float32, with checks as in PyTorch's Blas.cpp."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert (
            left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16) and out_dtype == torch.float32
        )
        return left.float() @ right.float()

    def addmm_out(target: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert target.dtype in (out_dtype, left.dtype) and out.dtype == out_dtype
        return out.copy_(target + mm(left, right, out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm_out, "CPU")
    monkeypatch.setattr("rlhf_ray.losses.chunked_logprobs.sums_halves_in_float32", lambda device: True)
    yield
    library._destroy()


@pytest.mark.usefixtures("halves_summed_in_float32")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_a_gpu_are_those_of_a_float32_head(dtype: torch.dtype, entropy: bool) -> None:
    hidden, weight, bias, targets = case()
    results = []
    for exact in (False, True):
        # The same numbers in float32: of half-precision operands alone are products taken in half precision.
        leaves = [x.to(dtype).to(torch.float32 if exact else dtype).requires_grad_() for x in (hidden, weight, bias)]
        logprobs, entropies = chunked_logprobs_and_entropy(
            leaves[0],
            leaves[1],
            targets,
            bias=leaves[2],
            temperature=0.7,
            entropy_gradient=entropy,
            max_logits=5 * len(weight),
        )
        assert entropies is not None
        weights = torch.linspace(-1.0, 1.0, len(hidden))
        (logprobs * weights + (entropies * weights.flip(0) if entropy else 0.0)).mean().backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves)
        results.append((logprobs.detach(), entropies.detach(), *(leaf.grad.float() for leaf in leaves)))

    (logprobs, entropies, *grads), (wanted, wanted_entropies, *wanted_grads) = results
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, wanted_entropies, rtol=1e-6, atol=1e-6)
    for given, exact_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(given, exact_grad, rtol=2e-2, atol=2e-2 * float(exact_grad.abs().max()))


@pytest.mark.usefixtures("halves_summed_in_float32")
def test_a_gpu_makes_no_float32_copy_of_the_weight() -> None:
    hidden, weight = torch.ones(1000, 3).bfloat16().requires_grad_(), torch.zeros(2, 3).bfloat16().requires_grad_()
    targets = torch.zeros(1000, dtype=torch.int64)
    with Shapes(2, 3, dtype=torch.float32) as weights:
        chunked_logprobs_and_entropy(hidden, weight, targets, max_logits=4)[0].sum().backward()

    # In bfloat16 the sum would end at 128.
    assert weight.grad is not None and weight.grad.flatten().tolist() == [500.0] * 3 + [-500.0] * 3
    assert weights.made == 1, "one in which the gradient is summed"
