import math

import pytest
import torch

from rlhf_ray.advantages.ratio import MAX_LOG_RATIO
from rlhf_ray.losses import behavior_weights, ppo_loss

ANY = {"level": "token", "mode": "truncate", "cap": 2.0}


def with_ratios(ratios, mask=None, **kwargs):
    """Weights and metrics of rows whose tokens have these ratios of proximal to behavior policy."""
    proximal = torch.tensor(ratios).log()
    mask = torch.ones_like(proximal) if mask is None else torch.tensor(mask)
    weights, metrics = behavior_weights(proximal, torch.zeros_like(proximal), mask, **{**ANY, **kwargs})
    return weights.tolist(), {name: metric.item() for name, metric in metrics.items()}


def approx(rows):
    return [pytest.approx(row, rel=1e-5) for row in rows]


@pytest.mark.parametrize(
    ("mode", "floor", "expected"),
    [
        ("truncate", None, [3.0, 2.0, 0.1]),
        ("truncate", 0.5, [3.0, 2.0, 0.5]),
        ("mask", None, [0.0, 2.0, 0.1]),
        ("mask", 0.5, [0.0, 2.0, 0.0]),
    ],
)
def test_token_level_hand_computed(mode, floor, expected):
    assert with_ratios([[8.0, 2.0, 0.1]], mode=mode, cap=3.0, floor=floor)[0] == approx([expected])


@pytest.mark.parametrize(
    ("mode", "floor", "expected"),
    [
        # Products over the unmasked tokens: 4 * 2 = 8, 4 * 0.5 = 2, 0.25.
        ("truncate", None, [[3.0, 3.0], [2.0, 2.0], [0.25, 0.0]]),
        ("truncate", 0.5, [[3.0, 3.0], [2.0, 2.0], [0.5, 0.0]]),
        ("mask", None, [[0.0, 0.0], [2.0, 2.0], [0.25, 0.0]]),
        ("mask", 0.5, [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]),
    ],
)
def test_sequence_level_hand_computed(mode, floor, expected):
    ratios, mask = [[4.0, 2.0], [4.0, 0.5], [0.25, 9.0]], [[1, 1], [1, 1], [1, 0]]
    assert with_ratios(ratios, mask, level="sequence", mode=mode, cap=3.0, floor=floor)[0] == approx(expected)


@pytest.mark.parametrize(
    ("level", "cap", "mask", "expected"),
    [
        ("token", 2.0, [1, 1, 1], [1.6487, 0.6065, 2.0]),
        ("sequence", 5.0, [1, 1, 1], [2.7183, 2.7183, 2.7183]),  # exp(0.5 - 0.5 + 1)
        ("sequence", 10.0, [1, 0, 1], [4.4817, 0.0, 4.4817]),  # exp(0.5 + 1)
        ("sequence", 2.5, [1, 1, 1], [2.5, 2.5, 2.5]),
    ],
)
def test_equals_published_numbers(level, cap, mask, expected):
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_off_policy_correction.py, test_compute_tis_ratio_*: log-ratios 0.5, -0.5
    # and 1. The cap of 2.5 is not among its cases.
    proximal, behavior = torch.tensor([[-1.0, -1.5, -0.5]]), torch.tensor([[-1.5, -1.0, -1.5]])
    weights, _ = behavior_weights(proximal, behavior, torch.tensor([mask]), level=level, mode="truncate", cap=cap)
    assert weights.tolist() == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize(
    ("log_ratios", "expected"),
    [([15.0, 15.0], 20.0), ([30.0, -10.0], 20.0), ([30.0, -12.0], 18.0), ([-30.0, 30.0], 0.0), ([15.0, 4.0], 19.0)],
)
def test_the_sum_of_a_sequence_is_bounded_and_not_its_tokens(log_ratios, expected):
    # By 20, from above only.
    proximal = torch.tensor([log_ratios])
    settings = {"level": "sequence", "mode": "truncate", "cap": math.inf}
    weights, _ = behavior_weights(proximal, torch.zeros(1, 2), torch.ones(1, 2), **settings)
    assert weights.log().tolist() == [pytest.approx([expected] * 2, rel=1e-5)]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.5, 8.0])
def test_of_a_single_token_both_levels_are_the_same(mode, ratio):
    token, sequence = (with_ratios([[ratio]], level=level, mode=mode, floor=0.5) for level in ("token", "sequence"))
    assert token == sequence


def test_metrics_hand_computed():
    # Ratios 4, 1, 1, 0.5 under a cap of 2: weights 2, 1, 1, 0.5.
    _, metrics = with_ratios([[4.0, 1.0], [1.0, 0.5]])
    assert metrics == pytest.approx(
        {
            "behavior_weight_mean": 1.125,
            "behavior_ratio_max": 4.0,
            "behavior_clip_fraction": 0.25,
        },
        rel=1e-5,
    )


def test_expectation_under_the_behavior_policy_becomes_that_under_the_proximal_one():
    generator = torch.Generator().manual_seed(0)
    proximal, behavior = torch.randn(2, 7, generator=generator, dtype=torch.float64).softmax(-1).unbind(0)
    f = torch.randn(7, generator=generator, dtype=torch.float64)
    one_token = {"level": "token", "mode": "truncate", "cap": math.inf}
    weights, _ = behavior_weights(proximal.log()[:, None], behavior.log()[:, None], torch.ones(7, 1), **one_token)
    torch.testing.assert_close((behavior * weights[:, 0] * f).sum(), (proximal * f).sum())
    # All sequences of two independent tokens, with f of the pair.
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    weights, _ = behavior_weights(
        proximal.log()[pairs], behavior.log()[pairs], torch.ones(49, 2), **one_token | {"level": "sequence"}
    )
    of_pair = f[pairs].prod(dim=1)
    weighted = behavior[pairs].prod(dim=1) * weights[:, 0] * of_pair
    torch.testing.assert_close(weighted.sum(), (proximal[pairs].prod(dim=1) * of_pair).sum())


def test_decoupled_ppo_inside_the_bounds_weights_by_current_over_behavior():
    # proximal / behavior * current / proximal = current / behavior, by which plain importance sampling weights.
    generator = torch.Generator().manual_seed(1)
    current, proximal, behavior = 0.1 * torch.randn(3, 4, 5, generator=generator)
    advantages, mask = torch.randn(4, 5, generator=generator), torch.ones(4, 5)
    weights, _ = behavior_weights(proximal, behavior, mask, **ANY)
    loss, _ = ppo_loss(current, proximal, advantages, mask, clip_low=0.9, clip_high=9.0, behavior_weights=weights)
    torch.testing.assert_close(loss, -((current - behavior).exp() * advantages).mean())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_made_of_the_trained_logprobs_are_constants_to_the_gradient(level, mode):
    # One token each, 0.5 / 0.25 = 2 and 0.5 / 0.5 = 1, with A = 3 and -1: gradient -w A / 2, and not twice the first.
    logprobs = torch.tensor([[0.5], [0.5]]).log().requires_grad_()
    behavior = torch.tensor([[0.25], [0.5]]).log()
    weights, _ = behavior_weights(logprobs, behavior, torch.ones(2, 1), level=level, mode=mode, cap=4.0)
    advantages = torch.tensor([[3.0], [-1.0]])
    loss, _ = ppo_loss(
        logprobs, logprobs.detach(), advantages, torch.ones(2, 1), clip_low=0.2, clip_high=0.2, behavior_weights=weights
    )
    loss.backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([-3.0, 0.5])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
class TestEveryChoice:
    def batch(self):
        generator = torch.Generator().manual_seed(2)
        proximal, behavior = torch.randn(2, 6, 5, generator=generator).unbind(0)
        mask = torch.rand(6, 5, generator=generator) < 0.6
        mask[2], mask[4] = True, False
        return proximal, behavior, mask

    def test_on_policy_weights_are_exactly_one(self, level, mode):
        proximal, _, mask = self.batch()
        weights, metrics = behavior_weights(
            proximal, proximal.clone(), mask, level=level, mode=mode, cap=1.0, floor=1.0
        )
        assert torch.equal(weights, mask.float())
        assert metrics["behavior_clip_fraction"].item() == 0.0
        for name in ("behavior_weight_mean", "behavior_ratio_max"):
            assert metrics[name].item() == pytest.approx(1.0)

    @pytest.mark.parametrize("garbage", [1e38, math.nan, math.inf, -math.inf])
    def test_garbage_under_the_mask_changes_nothing(self, level, mode, garbage):
        proximal, behavior, mask = self.batch()
        kwargs = {"level": level, "mode": mode, "cap": 2.0, "floor": 0.3}
        clean, metrics = behavior_weights(proximal, behavior, mask, **kwargs)
        dirty, dirty_metrics = behavior_weights(
            proximal.masked_fill(~mask, garbage), behavior.masked_fill(~mask, -garbage), mask, **kwargs
        )
        assert torch.equal(clean, dirty)
        assert metrics == dirty_metrics
        assert (clean[~mask] == 0).all()

    def test_rows_do_not_depend_on_each_other(self, level, mode):
        proximal, behavior, mask = self.batch()
        kwargs = {"level": level, "mode": mode, "cap": 2.0, "floor": 0.3}
        whole, metrics = behavior_weights(proximal, behavior, mask, **kwargs)
        parts = [
            behavior_weights(proximal[rows], behavior[rows], mask[rows], **kwargs)
            for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
        ]
        assert torch.equal(torch.cat([weights for weights, _ in parts]), whole)
        shares = [(mask[rows].sum() / mask.sum()).item() for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
        means = {
            name: sum(share * part[name].item() for share, (_, part) in zip(shares, parts, strict=True))
            for name in metrics
        }
        for name in ("behavior_weight_mean", "behavior_clip_fraction"):
            assert means[name] == pytest.approx(metrics[name].item())
        assert max(part["behavior_ratio_max"].item() for _, part in parts) == metrics["behavior_ratio_max"].item()

    @pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
    def test_nothing_unmasked_gives_zeros(self, level, mode, shape):
        row = torch.full(shape, math.nan)
        weights, metrics = behavior_weights(row, row, torch.zeros(shape), level=level, mode=mode, cap=2.0, floor=0.5)
        assert torch.equal(weights, torch.zeros(shape))
        assert all(metric.item() == 0.0 for metric in metrics.values())

    def test_no_gradient_passes(self, level, mode):
        proximal, behavior, mask = self.batch()
        weights, metrics = behavior_weights(
            proximal.requires_grad_(), behavior.requires_grad_(), mask, level=level, mode=mode, cap=2.0
        )
        assert not weights.requires_grad
        assert not any(metric.requires_grad for metric in metrics.values())

    def test_metrics_are_scalars_in_the_dtype_of_the_weights(self, level, mode):
        proximal, behavior, mask = self.batch()
        weights, metrics = behavior_weights(proximal, behavior, mask, level=level, mode=mode, cap=2.0)
        assert weights.dtype == torch.float32
        assert all(metric.shape == () and metric.dtype == torch.float32 for metric in metrics.values())

    def test_half_precision_is_computed_in_float32(self, level, mode):
        proximal, behavior, mask = self.batch()
        proximal, behavior = proximal.bfloat16(), behavior.bfloat16()
        kwargs = {"level": level, "mode": mode, "cap": 2.0}
        half, _ = behavior_weights(proximal, behavior, mask, **kwargs)
        assert torch.equal(half, behavior_weights(proximal.float(), behavior.float(), mask, **kwargs)[0])

    @pytest.mark.parametrize("difference", [1e4, math.inf])
    def test_huge_log_ratio_stays_finite(self, level, mode, difference):
        proximal = torch.tensor([[difference, 0.0], [-difference, 0.0]])
        weights, metrics = behavior_weights(
            proximal, torch.zeros(2, 2), torch.ones(2, 2), level=level, mode=mode, cap=math.inf
        )
        assert weights[0, 0].item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)
        assert weights[1, 0].item() == 0.0
        assert all(math.isfinite(metric.item()) for metric in metrics.values())

    def test_a_nan_that_counts_is_not_hidden(self, level, mode):
        proximal, behavior, mask = self.batch()
        behavior[2, 1] = math.nan
        weights, _ = behavior_weights(proximal, behavior, mask, level=level, mode=mode, cap=2.0, floor=0.5)
        assert math.isnan(weights[2, 1].item())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"level": "group"}, "unknown level 'group'; use one of token, sequence"),
        ({"mode": "clip"}, "unknown mode 'clip'; use one of truncate, mask"),
        ({"cap": 0.9}, "cap = 0.9: must be at least 1"),
        ({"cap": math.nan}, "cap = nan"),
        ({"floor": 1.1}, "floor = 1.1: must be from 0 to 1"),
        ({"floor": -0.1}, "floor = -0.1"),
    ],
)
def test_misuse_is_refused(kwargs, message):
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        behavior_weights(row, row, torch.ones(1, 2), **{**ANY, **kwargs})


def test_wrong_shapes_are_refused():
    row = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"proximal_logprobs \(1, 2\), behavior_logprobs \(1, 1\)"):
        behavior_weights(row, row[:, 1:], torch.ones(1, 2), **ANY)
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        behavior_weights(row[0], row[0], torch.ones(2), **ANY)
