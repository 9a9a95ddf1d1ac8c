import math

import numpy as np
import pytest
import torch

from rlhf_ray.losses import aggregate, global_normalizer
from rlhf_ray.losses.aggregation import MODES

X = torch.tensor([[1.0, 2.0, 3.0, 50.0], [8.0, 50.0, 50.0, 50.0], [50.0, 50.0, 50.0, 50.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)

# Row sums 6 and 8, lengths 3 and 1, two sequences (the third has no token), width 4.
EXPECTED = {
    "token_mean": 3.5,  # (6 + 8) / 4
    "seq_mean_token_mean": 5.0,  # (6 / 3 + 8 / 1) / 2
    "seq_mean_token_sum": 7.0,  # (6 + 8) / 2
    "seq_mean_token_sum_norm": 1.75,  # (6 + 8) / (2 * 4)
}


@pytest.mark.parametrize("mode", MODES)
def test_hand_computed(mode):
    assert aggregate(X, MASK, mode).item() == pytest.approx(EXPECTED[mode])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token_mean", 2.5), ("seq_mean_token_mean", 3.0), ("seq_mean_token_sum", 5.0), ("seq_mean_token_sum_norm", 1.25)],
)
def test_equals_published_numbers(mode, expected):
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_ppo_utils.py, test_reduce_loss, with a constant length of 4. The third
    # mode is not among its three: (1 + 2 + 3 + 4) / 2.
    x, mask = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    normalizer = global_normalizer([3, 1], mode, max_length=4)
    assert aggregate(x, mask, mode, normalizer).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "long", "short"),
    [
        # What a token of the row of three and the only token of the other row weigh.
        ("token_mean", 1 / 4, 1 / 4),
        ("seq_mean_token_mean", 1 / 6, 1 / 2),
        ("seq_mean_token_sum", 1 / 2, 1 / 2),
        ("seq_mean_token_sum_norm", 1 / 8, 1 / 8),
    ],
)
def test_gradient_is_the_weight_of_each_token(mode, long, short):
    x = X.clone().requires_grad_()
    aggregate(x, MASK, mode).backward()
    expected = torch.tensor([[long, long, long, 0.0], [short, 0.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_rows_alone_add_up_to_the_whole(mode):
    x = X.clone().requires_grad_()
    whole = aggregate(x, MASK, mode)
    (gradient,) = torch.autograd.grad(whole, x)
    normalizer = global_normalizer([3, 1, 0], mode, max_length=4)
    parts = [aggregate(x[row : row + 1, :3], MASK[row : row + 1, :3], mode, normalizer) for row in range(3)]
    sum(parts).backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item())
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("mode", MODES)
def test_global_normalizer_of_the_whole_is_the_default(mode):
    normalizer = global_normalizer([3, 1, 0], mode, max_length=4)
    assert aggregate(X, MASK, mode, normalizer).item() == pytest.approx(EXPECTED[mode])


@pytest.mark.parametrize("mode", MODES)
def test_normalizer_is_the_denominator(mode):
    doubled = 2 * global_normalizer([3, 1, 0], mode, max_length=4)
    assert aggregate(X, MASK, mode, doubled).item() == pytest.approx(EXPECTED[mode] / 2)


def test_modes_agree_on_one_full_sequence_of_one_token():
    for mode in MODES:
        assert aggregate(torch.tensor([[3.0]]), torch.tensor([[1]]), mode).item() == 3.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_under_the_mask_changes_nothing(mode, garbage):
    x = X.masked_fill(~MASK, garbage).requires_grad_()
    loss = aggregate(x, MASK, mode)
    loss.backward()
    assert loss.item() == pytest.approx(EXPECTED[mode])
    assert (x.grad[~MASK] == 0).all()
    assert (x.grad[MASK] > 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalizer", [None, 0.0, 7.0])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zero_loss_and_gradient(mode, normalizer, shape):
    x = torch.full(shape, math.nan, requires_grad=True)
    loss = aggregate(x, torch.zeros(shape), mode, normalizer)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros(shape))


def test_norm_mode_divides_by_the_given_constant_not_the_width():
    normalizer = global_normalizer([3, 1, 0], "seq_mean_token_sum_norm", max_length=10)
    assert normalizer == 20.0
    narrow = aggregate(X, MASK, "seq_mean_token_sum_norm", normalizer)
    padded = torch.nn.functional.pad(X, (0, 5)), torch.nn.functional.pad(MASK, (0, 5))
    assert aggregate(*padded, "seq_mean_token_sum_norm", normalizer).item() == narrow.item() == pytest.approx(0.7)


def test_counts_of_disjoint_parts_add_up():
    lengths = [3, 0, 1, 7]
    for mode in MODES:
        parts = [global_normalizer(part, mode, max_length=8) for part in (lengths[:1], lengths[1:2], lengths[2:], [])]
        assert sum(parts) == global_normalizer(lengths, mode, max_length=8)


def test_lengths_may_be_a_numpy_array():
    assert global_normalizer(np.array([3, 0, 1]), "token_mean") == 4.0
    assert global_normalizer(np.array([3, 0, 1]), "seq_mean_token_sum") == 2.0


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; use one of token_mean, "):
        aggregate(X, MASK, "mean")
    with pytest.raises(ValueError, match="unknown aggregation"):
        global_normalizer([1], "sum")
    with pytest.raises(ValueError, match=r"x \(3, 4\), mask \(3, 3\)"):
        aggregate(X, MASK[:, :3], "token_mean")
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        aggregate(X[0], MASK[0], "token_mean")
    for normalizer in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="normalizer = "):
            aggregate(X, MASK, "token_mean", normalizer)
    with pytest.raises(ValueError, match="lengths must not be negative, got -2"):
        global_normalizer([3, -2], "token_mean")
    for max_length in (None, 0):
        with pytest.raises(ValueError, match=f"max_length = {max_length}"):
            global_normalizer([3], "seq_mean_token_sum_norm", max_length=max_length)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_trajectory_add_up_to_one_row_of_all_its_tokens(mode):
    # Of two trajectories the first has rows of 3 and 1 tokens, which may lie in two calls, and one without tokens.
    rows = torch.tensor([[1.0, 2.0, 3.0], [8.0, 50.0, 50.0], [50.0, 50.0, 50.0], [4.0, 6.0, 50.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    joined = torch.tensor([[1.0, 2.0, 3.0, 8.0], [4.0, 6.0, 0.0, 0.0]], requires_grad=True)
    count = global_normalizer([4, 2], mode, max_length=4)
    whole = aggregate(joined, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), mode, count)
    share = torch.tensor([3 / 4, 1 / 4, 0.0, 1.0]) if mode == "seq_mean_token_mean" else torch.ones(4)
    normalizer = count / share
    parts = [aggregate(rows[i : i + 2], mask[i : i + 2], mode, normalizer[i : i + 2]) for i in (0, 2)]
    (sum(parts)).backward()
    whole.backward()
    assert sum(parts).item() == pytest.approx(whole.item())
    wanted = torch.stack(
        [joined.grad[0, :3], torch.tensor([joined.grad[0, 3], 0, 0]), torch.zeros(3), joined.grad[1, :3]]
    )
    torch.testing.assert_close(rows.grad, wanted * mask)


def test_a_normalizer_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"normalizer \(2,\) does not fit 3 rows"):
        aggregate(X, MASK, "token_mean", torch.ones(2))
