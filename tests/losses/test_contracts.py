"""What every loss of the package promises, checked on each of them."""

import math

import pytest
import torch

from rlhf_ray.losses import entropy_bonus, global_normalizer, kl_loss, ppo_loss, value_loss
from rlhf_ray.losses.aggregation import MODES

ROWS, WIDTH, MAX_LENGTH = 9, 7, 12


def ppo(x, others, mask, **kwargs):
    return ppo_loss(
        x,
        others[0],
        others[1],
        mask,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=1.5,
        behavior_weights=others[2].exp(),
        **kwargs,
    )


def value(x, others, mask, **kwargs):
    return value_loss(x, others[0], others[1], mask, clip=0.4, **kwargs)


def entropy(x, others, mask, **kwargs):
    return entropy_bonus(x, mask, **kwargs)


def kl(estimator):
    def loss(x, others, mask, **kwargs):
        return kl_loss(x, others[0], mask, estimator=estimator, **kwargs)

    return loss


LOSSES = {
    "ppo": ppo,
    "value": value,
    "entropy": entropy,
    "kl_k1": kl("k1"),
    "kl_k2": kl("k2"),
    "kl_k3": kl("k3"),
    "kl_abs": kl("abs"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_mode = pytest.mark.parametrize("mode", MODES)


def random_batch(seed=0):
    """The trained tensor, what it is compared with, and a mask with gaps, a full row and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    x, *others = torch.randn(4, ROWS, WIDTH, generator=generator).unbind(0)
    mask = torch.rand(ROWS, WIDTH, generator=generator) < 0.5
    mask[3], mask[5] = True, False
    return x.clone().requires_grad_(), others, mask


def microbatches(mask, seed):
    """Row indices in random order, cut at random places, each with its own padded width."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(ROWS, generator=generator)
    cuts = torch.randperm(ROWS - 1, generator=generator)[:3].add(1).sort().values.tolist()
    for rows in order.tensor_split(cuts):
        columns = mask[rows].any(0).nonzero()
        yield rows, int(columns.max()) + 1 if len(columns) else 0


@every_loss
@every_mode
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_do_not_depend_on_the_split(loss, mode, seed):
    x, others, mask = random_batch()
    normalizer = global_normalizer(mask.sum(1).tolist(), mode, max_length=MAX_LENGTH)
    whole, _ = loss(x, others, mask, aggregation=mode, normalizer=normalizer)
    (whole_gradient,) = torch.autograd.grad(whole, x)
    total = 0.0
    for rows, width in microbatches(mask, seed):
        part = [tensor[rows, :width] for tensor in (x, *others, mask)]
        part_loss, _ = loss(part[0], part[1:-1], part[-1], aggregation=mode, normalizer=normalizer)
        part_loss.backward()
        total += part_loss.item()
    assert total == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(x.grad, whole_gradient, rtol=0, atol=1e-6)
    assert whole_gradient.abs().max() > 1e-3


@every_loss
def test_metrics_of_parts_weighted_by_tokens_equal_those_of_the_whole(loss):
    x, others, mask = random_batch()
    _, whole = loss(x, others, mask)
    combined = dict.fromkeys(whole, 0.0)
    for rows, width in microbatches(mask, seed=1):
        part = [tensor[rows, :width] for tensor in (x, *others, mask)]
        _, metrics = loss(part[0], part[1:-1], part[-1])
        share = (part[-1].sum() / mask.sum()).item()
        for name, metric in metrics.items():
            assert metric.shape == ()
            if name.endswith("_max"):
                combined[name] = max(combined[name], metric.item())
            else:
                combined[name] += share * metric.item()
    assert combined == pytest.approx({name: metric.item() for name, metric in whole.items()}, abs=1e-6)


@every_loss
@every_mode
@pytest.mark.parametrize("garbage", [1e38, math.nan, math.inf, -math.inf])
def test_garbage_under_the_mask_changes_nothing(loss, mode, garbage):
    x, others, mask = random_batch()
    clean, clean_metrics = loss(x, others, mask, aggregation=mode)
    (clean_gradient,) = torch.autograd.grad(clean, x)
    x, *others = (tensor.detach().masked_fill(~mask, garbage) for tensor in (x, *others))
    x.requires_grad_()
    dirty, dirty_metrics = loss(x, others, mask, aggregation=mode)
    (dirty_gradient,) = torch.autograd.grad(dirty, x)
    assert torch.equal(clean, dirty)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert (dirty_gradient[~mask] == 0).all()
    assert all(torch.equal(clean_metrics[name], dirty_metrics[name]) for name in clean_metrics)


@every_loss
@every_mode
@pytest.mark.parametrize("normalizer", [None, 5.0])
@pytest.mark.parametrize("width", [WIDTH, 0])
def test_nothing_unmasked_gives_zero_loss_zero_gradient_and_finite_metrics(loss, mode, normalizer, width):
    x, others, mask = random_batch()
    nothing = torch.zeros_like(mask)[:, :width]
    others = [tensor[:, :width] for tensor in others]
    total, metrics = loss(x[:, :width], others, nothing, aggregation=mode, normalizer=normalizer)
    total.backward()
    assert total.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(metric.item() == 0.0 for metric in metrics.values())


@every_loss
def test_only_the_trained_tensor_gets_a_gradient(loss):
    x, others, mask = random_batch()
    for tensor in others:
        tensor.requires_grad_()
    total, metrics = loss(x, others, mask)
    total.backward()
    assert x.grad.abs().max() > 0
    assert all(tensor.grad is None for tensor in others)
    assert not any(metric.requires_grad for metric in metrics.values())


@every_loss
def test_mask_may_be_numbers(loss):
    x, others, mask = random_batch()
    assert torch.equal(loss(x, others, mask)[0], loss(x, others, mask.float())[0])


@every_loss
def test_wrong_shapes_are_refused(loss):
    x, others, mask = random_batch()
    with pytest.raises(ValueError, match="shapes differ"):
        loss(x, others, mask[:, 1:])
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        loss(x[0], [tensor[0] for tensor in others], mask[0])
    with pytest.raises(ValueError, match="unknown aggregation"):
        loss(x, others, mask, aggregation="mean")
