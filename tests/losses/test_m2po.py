import math

import pytest
import torch

from rlhf_ray.losses import m2po_mask, ppo_loss


def of_row(differences, advantages, threshold, mask=None):
    logprobs = torch.tensor([differences])
    mask = torch.ones_like(logprobs) if mask is None else torch.tensor([mask])
    kept = m2po_mask(logprobs, torch.zeros_like(logprobs), torch.tensor([advantages]), mask, threshold=threshold)
    return kept[0].tolist()


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # Squares 0.01, 0.16, 0.04, 0.64. Means of the 1, 2, 3, 4 smallest: 0.01, 0.025, 0.07, 0.2125.
        (0.3, [True, True, True, True]),
        (0.1, [True, True, True, False]),
        (0.06, [True, False, True, False]),
        (0.02, [True, False, False, False]),
        (0.005, [False, False, False, False]),
    ],
)
def test_hand_computed(threshold, expected):
    assert of_row([0.1, 0.4, 0.2, 0.8], [1.0, 2.0, 0.5, 3.0], threshold) == expected
    assert of_row([-0.1, -0.4, -0.2, -0.8], [-1.0, -2.0, -0.5, -3.0], threshold) == expected


def test_only_tokens_that_move_further_away_are_dropped_or_counted():
    # The first moves with its advantage and is beyond the threshold alone. The others move against theirs, have no
    # advantage or have not moved: kept, however far, and their squares, 0 among them, do not enter the mean.
    assert of_row([0.3, -5.0, 5.0, 5.0, 0.0], [1.0, 1.0, -1.0, 0.0, 1.0], 0.04) == [False, True, True, True, True]
    assert of_row([0.1, -5.0, 5.0, 5.0, 0.0], [1.0, 1.0, -1.0, 0.0, 1.0], 0.04) == [True] * 5


@pytest.mark.parametrize(
    ("differences", "threshold"),
    [([0.5], 0.25), ([0.5, 0.5, 0.5], 0.25), ([0.5, 1.0], 0.625), ([1.0, 0.5, 0.0], 0.625)],
)
def test_a_mean_of_exactly_the_threshold_keeps_every_token(differences, threshold):
    assert of_row(differences, [1.0] * len(differences), threshold) == [True] * len(differences)


def test_of_equal_tokens_the_later_are_dropped():
    # Squares 0.01, 0.25, 0.25, 0.25: means 0.01, 0.13, 0.17, 0.19.
    assert of_row([0.1, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], 0.18) == [True, True, True, False]


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages = torch.randn(3, 8, 9, generator=generator).unbind(0)
    return 0.3 * new, 0.3 * old, advantages, torch.rand(8, 9, generator=generator) < 0.7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.01, 0.04, 0.1])
def test_equals_the_published_loop(seed, threshold):
    new, old, advantages, mask = random_batch(seed)
    squares = (new - old).double().square()
    constrained = {
        (row, column) for row, column in mask.nonzero().tolist() if ((new - old) * advantages)[row, column] > 0
    }
    expected = mask.clone()
    while constrained and sum(squares[at] for at in constrained) / len(constrained) > threshold:
        furthest = max(constrained, key=lambda at: squares[at])
        constrained.remove(furthest)
        expected[furthest] = False
    kept = m2po_mask(new, old, advantages, mask, threshold=threshold)
    assert torch.equal(kept, expected)
    assert mask.sum() > kept.sum() > 0


@pytest.mark.parametrize("garbage", [1e38, math.nan, math.inf, -math.inf])
def test_garbage_under_the_mask_changes_nothing(garbage):
    *tensors, mask = random_batch()
    clean = m2po_mask(*tensors, mask, threshold=0.04)
    dirty = m2po_mask(*(tensor.masked_fill(~mask, garbage) for tensor in tensors), mask, threshold=0.04)
    assert torch.equal(clean, dirty)
    assert not clean[~mask].any()


def test_does_not_depend_on_the_order_of_sequences_and_padding():
    *tensors, mask = random_batch()
    whole = m2po_mask(*tensors, mask, threshold=0.04)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    reordered = [torch.nn.functional.pad(tensor[order], (0, 3)) for tensor in (*tensors, mask)]
    kept = m2po_mask(*reordered, threshold=0.04)
    assert torch.equal(kept[:, :9], whole[order])
    assert not kept[:, 9:].any()


def test_the_view_must_be_global():
    # Squares 0.01 and 0.09: their mean, 0.05, is within the threshold, but the second alone is not.
    assert of_row([0.1, 0.3], [1.0, 1.0], 0.06) == [True, True]
    assert of_row([0.1], [1.0], 0.06) + of_row([0.3], [1.0], 0.06) == [True, False]


def test_as_behavior_weights_it_gives_the_published_loss():
    new, old, advantages, mask = random_batch()
    new.requires_grad_()
    kept = m2po_mask(new, old, advantages, mask, threshold=0.04)
    loss, _ = ppo_loss(
        new,
        old,
        advantages,
        mask,
        clip_low=1.0,
        clip_high=math.inf,
        behavior_weights=kept,
        aggregation="seq_mean_token_mean",
    )
    # 1/G sum over sequences of 1/|o| sum over tokens of keep * ratio * A, |o| with the dropped tokens.
    objective = (kept * (new - old).exp() * advantages).sum(1) / mask.sum(1)
    torch.testing.assert_close(loss, -objective.mean())
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.equal(gradient != 0, kept)


def test_with_the_mask_of_the_whole_microbatches_add_up():
    new, old, advantages, mask = random_batch()
    new.requires_grad_()
    kept = m2po_mask(new, old, advantages, mask, threshold=0.04)
    settings = {"clip_low": 1.0, "clip_high": math.inf, "normalizer": float(mask.sum())}
    whole, _ = ppo_loss(new, old, advantages, mask, behavior_weights=kept, **settings)
    (gradient,) = torch.autograd.grad(whole, new)
    parts = [
        ppo_loss(new[rows], old[rows], advantages[rows], mask[rows], behavior_weights=kept[rows], **settings)[0]
        for rows in (slice(0, 1), slice(1, 6), slice(6, 8))
    ]
    sum(parts).backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(new.grad, gradient, rtol=0, atol=1e-6)


def test_result_is_a_new_tensor_of_booleans_without_gradient():
    new, old, advantages, mask = random_batch()
    before = mask.clone()
    kept = m2po_mask(new.requires_grad_(), old, advantages, mask, threshold=0.01)
    assert kept.dtype == torch.bool
    assert not kept.requires_grad
    assert torch.equal(mask, before)
    assert torch.equal(m2po_mask(new, old, advantages, mask.float(), threshold=0.01), kept)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_keeps_nothing(shape):
    row = torch.full(shape, math.nan)
    assert torch.equal(m2po_mask(row, row, row, torch.zeros(shape), threshold=0.04), torch.zeros(shape).bool())


@pytest.mark.parametrize("difference", [1e4, 1e30, math.inf])
def test_huge_differences_are_dropped_first(difference):
    assert of_row([0.1, difference], [1.0, 1.0], 0.04) == [True, False]


def test_half_precision_is_computed_in_float32():
    new, old, advantages, mask = random_batch()
    half = [tensor.bfloat16() for tensor in (new, old, advantages)]
    expected = m2po_mask(*(tensor.float() for tensor in half), mask, threshold=0.04)
    assert torch.equal(m2po_mask(*half, mask, threshold=0.04), expected)


def test_misuse_is_refused():
    row = torch.zeros(1, 2)
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"threshold = {threshold}: must be positive"):
            m2po_mask(row, row, row, torch.ones(1, 2), threshold=threshold)
    with pytest.raises(ValueError, match=r"advantages \(1, 1\)"):
        m2po_mask(row, row, row[:, 1:], torch.ones(1, 2), threshold=0.04)
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        m2po_mask(row[0], row[0], row[0], torch.ones(2), threshold=0.04)
