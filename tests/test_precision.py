"""Every public function of the maths in every floating-point type: one table for both packages, so that none is missed.

A function is called with tensors by the names of its parameters. A new one is tested without a line here, unless it
takes something that no other does.
"""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch

import rlhf_ray.advantages
import rlhf_ray.losses
from rlhf_ray.advantages import AdaptiveKLController, Moments, gae, kl
from rlhf_ray.losses import aggregate, behavior_weights, global_normalizer, gmpo_loss, gspo_loss

ROWS, WIDTH = 4, 3000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) < 0.9
GROUP_IDS = torch.arange(ROWS) // 2


def numbers(*shape, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64) + shift


def of_tokens(seed, scale=1.0, shift=0.0):
    return numbers(ROWS, WIDTH, seed=seed, scale=scale, shift=shift)


# Sums over a row of the large ones are beyond float16, and those of all beyond what bfloat16 can count.
LOGPROBS = of_tokens(1, 0.3, -2.0)
INPUTS = {
    "logprobs": LOGPROBS,
    "old_logprobs": LOGPROBS + of_tokens(2, 0.05),
    "ref_logprobs": LOGPROBS + of_tokens(3, 0.05),
    "proximal_logprobs": LOGPROBS + of_tokens(4, 0.01),
    "behavior_logprobs": LOGPROBS + of_tokens(5, 0.01),
    "behavior_weights": of_tokens(6, 0.1, 1.0),
    "advantages": of_tokens(7),
    "rewards": of_tokens(8, 1.0, 40.0),
    "values": of_tokens(9, 1.0, 50.0),
    "old_values": of_tokens(9, 1.0, 50.0) + of_tokens(10, 0.5),
    "returns": of_tokens(11, 5.0, 60.0),
    "entropies": of_tokens(12, 1.0, 45.0),
    "x": of_tokens(13, 1.0, 55.0),
    "bootstrap": numbers(ROWS, seed=14),
    "greedy_rewards": numbers(ROWS, seed=15, scale=10.0, shift=-4e4),
    "logits": numbers(ROWS, 50, seed=16, scale=4.0),
    "hidden": numbers(ROWS, 16, seed=17),
    "weight": numbers(50, 16, seed=18),
    "bias": numbers(50, seed=19),
    "mask": MASK,
    "group_ids": GROUP_IDS,
    "turn_ids": (torch.arange(WIDTH) // 100).expand(ROWS, WIDTH),
    "lengths": torch.tensor([3000, 1, 70000, 5]),
    "targets": torch.tensor([0, 49, 7, 7]),
    "method": "grpo",
    "estimator": "k3",
    "mode": "token_mean",
    "level": "group",
    "aggregation": "seq_mean_token_mean",
    "mean": True,
    "std": True,
    "gamma": 0.999,
    "lam": 0.98,
    "clip": 0.2,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "cap": 5.0,
    "threshold": 0.001,
    "coef": 0.1,
    "low": -3.0,
    "high": 3.0,
    "smoothing": 0.75,
    "temperature_positive": 1.0,
    "temperature_negative": 1.05,
    "entropy_gradient": True,
}
OF_COMPLETIONS = {"rewards": numbers(ROWS, seed=20, scale=10.0, shift=4e4)}
OWN_INPUTS = {
    "group_advantages": OF_COMPLETIONS,
    "normalize_rewards": OF_COMPLETIONS,
    "remax": OF_COMPLETIONS,
    "shape_rewards": OF_COMPLETIONS | {"scale": 3.0, "bias": 4e4, "clip": 2.5e5},
    "kl_penalized_rewards": OF_COMPLETIONS | {"kl": of_tokens(21)},
    "behavior_weights": {"mode": "truncate", "level": "sequence"},
    "explained_variance": {
        "returns": Moments(count=4, mean=1.0, m2=8.0),
        "residuals": Moments(count=4, mean=0.0, m2=2.0),
    },
    "hl_gauss_loss": {"returns": of_tokens(22), "value_logits": numbers(ROWS, WIDTH, 7, seed=23, scale=2.0)},
    "Moments": {"count": 3.0, "mean": 1.0, "m2": 2.0},
    "AdaptiveKLController": {"init_coef": 0.1, "target": 2.0, "horizon": 100.0},
    "global_normalizer": {"lengths": [3000, 1, 70000, 5]},
}
FUNCTIONS = {
    name: getattr(package, name) for package in (rlhf_ray.advantages, rlhf_ray.losses) for name in package.__all__
}
# Longer than any bound below would allow if it were rounded to half precision on the way.
RELATIVE = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-5, torch.float64: 1e-9}


def arguments(name, dtype):
    """What the function is called with: rounded to ``dtype``, tensors of floating point with a gradient."""
    function = FUNCTIONS[name]
    chosen = {}
    for parameter in inspect.signature(function).parameters.values():
        own = OWN_INPUTS.get(name, {})
        if parameter.name in own:
            chosen[parameter.name] = own[parameter.name]
        elif parameter.name in INPUTS:
            chosen[parameter.name] = INPUTS[parameter.name]
        else:
            assert parameter.default is not parameter.empty, f"{name}: say in INPUTS what {parameter.name} is"
    return {
        key: value.to(dtype, copy=True).requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in chosen.items()
    }


def in_double(given):
    return {
        key: value.detach().double().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in given.items()
    }


def tensors(result):
    """All floating-point tensors of a result, nested or not."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else [result.double()]
    if isinstance(result, dict):
        return [leaf for value in result.values() for leaf in tensors(value)]
    return [leaf for value in result for leaf in tensors(value)] if isinstance(result, tuple) else []


def size(x):
    return x.double().abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_computes_in_float32_or_better(name, dtype):
    given = arguments(name, dtype)
    exact = in_double(given)
    result, expected = FUNCTIONS[name](**given), FUNCTIONS[name](**exact)
    found, wanted = tensors(result), tensors(expected)
    assert len(found) == len(wanted)
    relative = RELATIVE[dtype]
    for ours, theirs in zip(found, wanted, strict=True):
        # In the type of the input, a result is rounded to it once.
        last_digit = torch.finfo(ours.dtype).eps / 2
        assert ours.dtype in {dtype, torch.promote_types(dtype, torch.float32), torch.float64}
        limit = torch.finfo(ours.dtype).max
        theirs = theirs.double().clamp(-limit, limit)
        assert torch.isfinite(ours).all()
        bound = (relative + last_digit) * max(1.0, size(theirs))
        assert (ours.double() - theirs).abs().max().item() <= bound
    differentiable = [i for i, tensor in enumerate(found) if tensor.requires_grad]
    assert differentiable == [i for i, tensor in enumerate(wanted) if tensor.requires_grad]
    for i in differentiable:
        found[i].sum().backward(retain_graph=True)
        wanted[i].sum().backward(retain_graph=True)
    for key, value in given.items():
        if isinstance(value, torch.Tensor) and value.grad is not None:
            assert value.grad.dtype == dtype
            bound = (relative + 2 * torch.finfo(dtype).eps) * size(exact[key].grad)
            bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # The smallest number that there is.
            assert (value.grad.double() - exact[key].grad).abs().max().item() <= bound
        elif isinstance(value, torch.Tensor):
            assert getattr(exact[key], "grad", None) is None


def test_the_losses_of_the_table_have_gradients():
    for name in FUNCTIONS:
        if name.endswith("_loss") or name in {"aggregate", "entropy_bonus"}:
            loss = tensors(FUNCTIONS[name](**arguments(name, torch.float32)))[0]
            assert loss.requires_grad


def test_a_token_mean_of_more_tokens_than_float16_counts():
    ones = torch.ones(1, 70_000, dtype=torch.float16)
    assert aggregate(ones, ones, "token_mean").item() == 1.0
    assert global_normalizer([np.float16(2048)] * 3 + [np.float16(1)], "token_mean") == 6145.0


def test_gae_of_a_long_completion_in_bfloat16():
    rewards, values = numbers(1, 4096, seed=1, scale=0.1), numbers(1, 4096, seed=2, scale=0.1)
    rewards, values, mask = rewards.bfloat16(), values.bfloat16(), torch.ones(1, 4096)
    settings = {"gamma": 1.0, "lam": 1.0}
    expected = gae(rewards.double(), values.double(), mask, **settings)
    for ours, exact in zip(gae(rewards, values, mask, **settings), expected, strict=True):
        assert (ours.double() - exact).abs().max() < 1e-3


def test_half_precision_log_probabilities_are_subtracted_after_they_are_widened():
    a, b = torch.tensor([-2.0]).bfloat16(), torch.tensor([-2.015625 - 2**-7]).bfloat16()
    assert kl(a, b, estimator="k2").item() == 0.5 * (a.double() - b.double()).item() ** 2


@pytest.mark.parametrize("kl_now", [np.float16(4.25), torch.tensor(4.25, dtype=torch.bfloat16)])
def test_the_kl_coefficient_stays_a_python_float(kl_now):
    controller = AdaptiveKLController(init_coef=0.5, target=4.0, horizon=1000)
    for _ in range(10):
        controller.update(kl=kl_now, num_samples=1)
    assert type(controller.coef) is float
    assert controller.coef == pytest.approx(0.5 * (1 + 0.0625 / 1000) ** 10, rel=1e-12)


def test_moments_of_half_precision():
    x = torch.full((70_000,), 3.0, dtype=torch.float16)
    assert dataclasses.astuple(Moments.of(x, torch.ones(70_000))) == (70_000.0, 3.0, 0.0)


# --- what is bounded is the sum over a sequence, not each of its tokens ------------------------------------------


ROW = torch.tensor([[30.0, -30.0, 0.0]])
ZERO, ONE = torch.zeros(1, 3), torch.ones(1, 3)
CLIP = {"clip_low": math.inf, "clip_high": math.inf}


def test_sequence_weight_of_ratios_that_cancel():
    weights, metrics = behavior_weights(ROW, ZERO, ONE, level="sequence", mode="truncate", cap=5.0)
    assert weights.tolist() == [[1.0, 1.0, 1.0]]
    assert metrics["behavior_clip_fraction"].item() == 0.0


@pytest.mark.parametrize(
    ("loss", "advantage", "bounds"),
    [(gspo_loss, 1.0, CLIP), (gspo_loss, -1.0, CLIP), (gmpo_loss, -1.0, {"clip_low": 40.0, "clip_high": 0.4})],
)
def test_sequence_ratio_of_ratios_that_cancel(loss, advantage, bounds):
    logprobs = ROW.clone().requires_grad_()
    value, _ = loss(logprobs, ZERO, advantage * ONE, ONE, **bounds)
    value.backward()
    assert value.item() == pytest.approx(-advantage)
    torch.testing.assert_close(logprobs.grad, -advantage * ONE / 3)


@pytest.mark.parametrize("loss", [gspo_loss, gmpo_loss])
@pytest.mark.parametrize("token", [100.0, 1e38, math.inf])
def test_sequence_ratio_stays_finite_and_without_gradient_beyond_the_bound(loss, token):
    logprobs = torch.tensor([[token, token, -1e38]], requires_grad=True)
    with_minus_infinity = torch.tensor([[token, -math.inf, 0.0]], requires_grad=True)
    for x in (logprobs, with_minus_infinity):
        value, metrics = loss(x, ZERO, -ONE, ONE, **CLIP)
        value.backward()
        assert math.isfinite(value.item())
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(metrics[name]) for name in ("ratio_mean", "ratio_max"))
    huge = torch.full((1, 3), token, requires_grad=True)
    value, _ = loss(huge, ZERO, -ONE, ONE, **CLIP)
    value.backward()
    assert value.item() == pytest.approx(math.exp(20.0), rel=1e-5)
    assert huge.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("token", [100.0, 1e38, math.inf])
def test_sequence_weight_stays_finite(token):
    for row, expected in (([token, token, 0.0], math.exp(20.0)), ([token, -math.inf, 0.0], 0.0)):
        weights, _ = behavior_weights(torch.tensor([row]), ZERO, ONE, level="sequence", mode="truncate", cap=math.inf)
        assert weights[0, 0].item() == pytest.approx(expected, rel=1e-5)
