"""What every loss of the package promises, checked on each of them."""

import inspect
import math

import pytest
import torch

import rlhf_ray.losses as package
from rlhf_ray.losses import (
    behavior_weights,
    cispo_loss,
    entropy_bonus,
    global_normalizer,
    gmpo_loss,
    gspo_loss,
    kl_loss,
    ppo_loss,
    sapo_loss,
    value_loss,
)
from rlhf_ray.losses.aggregation import MODES

ROWS, WIDTH, MAX_LENGTH = 9, 7, 12


CLIP = {"clip_low": 0.2, "clip_high": 0.3}
POLICY_LOSSES = {
    "ppo": (ppo_loss, CLIP | {"dual_clip": 1.5}),
    "gspo": (gspo_loss, CLIP),
    "cispo": (cispo_loss, CLIP),
    "sapo": (sapo_loss, {"temperature_positive": 1.0, "temperature_negative": 1.5}),
    "gmpo": (gmpo_loss, CLIP),
}


def policy(name):
    function, settings = POLICY_LOSSES[name]

    def loss(x, others, mask, **kwargs):
        return function(x, others[0], others[1], mask, behavior_weights=others[2].exp(), **settings, **kwargs)

    return loss


def value(**settings):
    def loss(x, others, mask, **kwargs):
        return value_loss(x, others[0], others[1], mask, **settings, **kwargs)

    return loss


def entropy(x, others, mask, **kwargs):
    return entropy_bonus(x, mask, **kwargs)


def kl(estimator):
    def loss(x, others, mask, **kwargs):
        return kl_loss(x, others[0], mask, estimator=estimator, **kwargs)

    return loss


LOSSES = {
    **{name: policy(name) for name in POLICY_LOSSES},
    "value": value(clip=0.4),
    "value_huber": value(clip=0.4, huber=0.7),
    "entropy": entropy,
    "kl_k1": kl("k1"),
    "kl_k2": kl("k2"),
    "kl_k3": kl("k3"),
    "kl_abs": kl("abs"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_policy_loss = pytest.mark.parametrize("name", POLICY_LOSSES)
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


@every_policy_loss
@every_mode
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_whole_objective_does_not_depend_on_the_split(name, mode, level):
    function, settings = POLICY_LOSSES[name]
    x, others, mask = random_batch()
    scale = {"aggregation": mode, "normalizer": global_normalizer(mask.sum(1).tolist(), mode, max_length=MAX_LENGTH)}

    def objective(x, old, advantages, written_by, mask):
        weights, _ = behavior_weights(old, written_by, mask, level=level, mode="truncate", cap=2.0)
        loss, _ = function(x, old, advantages, mask, behavior_weights=weights, **settings, **scale)
        bonus, _ = entropy_bonus(x.square(), mask, **scale)
        divergence, _ = kl_loss(x, written_by, mask, estimator="k3", **scale)
        return loss - 0.1 * bonus + 0.2 * divergence

    whole = objective(x, *others, mask)
    (whole_gradient,) = torch.autograd.grad(whole, x)
    total = 0.0
    for rows, width in microbatches(mask, seed=2):
        part = objective(*(tensor[rows, :width] for tensor in (x, *others, mask)))
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(x.grad, whole_gradient, rtol=0, atol=1e-5)
    assert whole_gradient.abs().max() > 1e-3


@every_loss
@every_mode
def test_a_sequence_without_tokens_is_as_if_it_were_not_there(loss, mode):
    x, others, mask = random_batch()
    kept = mask.any(dim=1)
    assert not kept.all()
    with_it, metrics = loss(x, others, mask, aggregation=mode)
    without, metrics_without = loss(x[kept], [tensor[kept] for tensor in others], mask[kept], aggregation=mode)
    torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(metrics, metrics_without)
    gradients = [torch.autograd.grad(total, x)[0] for total in (with_it, without)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][~kept] == 0).all()


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
def test_metrics_do_not_depend_on_aggregation_or_normalizer(loss):
    x, others, mask = random_batch()
    _, default = loss(x, others, mask)
    for mode in MODES:
        for normalizer in (None, 5.0):
            _, metrics = loss(x, others, mask, aggregation=mode, normalizer=normalizer)
            assert metrics == default


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
@every_mode
def test_no_sequences_give_zero_loss_and_finite_metrics(loss, mode):
    x, others, mask = random_batch()
    total, metrics = loss(x[:0], [tensor[:0] for tensor in others], mask[:0], aggregation=mode)
    total.backward()
    assert total.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(metric.item() == 0.0 for metric in metrics.values())


@every_loss
def test_a_sequence_of_one_token_weighs_the_same_in_every_mode(loss):
    x, others, _ = random_batch()
    x, others, mask = x.detach()[:1, :1], [tensor[:1, :1] for tensor in others], torch.ones(1, 1)
    totals = [loss(x, others, mask, aggregation=mode)[0].item() for mode in MODES]
    assert math.isfinite(totals[0])
    assert totals == [totals[0]] * len(MODES)


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


def test_every_policy_loss_is_checked_here():
    takes_advantages = {
        name for name in package.__all__ if name.endswith("_loss") and "advantages" in signature_of(name).parameters
    }
    assert takes_advantages == {f"{name}_loss" for name in POLICY_LOSSES}


def signature_of(name):
    return inspect.signature(getattr(package, name))


@every_policy_loss
def test_policy_losses_share_a_signature(name):
    parameters = list(signature_of(f"{name}_loss").parameters.values())
    assert [parameter.name for parameter in parameters[:4]] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert [parameter.name for parameter in parameters[-3:]] == ["behavior_weights", "aggregation", "normalizer"]
    assert [parameter.default for parameter in parameters[-3:]] == [None, "token_mean", None]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[4:])


@every_policy_loss
def test_policy_losses_share_their_metrics(name):
    x, others, mask = random_batch()
    _, metrics = policy(name)(x, others, mask)
    _, of_ppo = policy("ppo")(x, others, mask)
    assert {"approx_kl", "ratio_mean", "ratio_max"} <= metrics.keys()
    assert name == "sapo" or metrics.keys() == of_ppo.keys()
    assert torch.equal(metrics["approx_kl"], of_ppo["approx_kl"])


@every_policy_loss
@every_mode
def test_on_policy_gradient_is_the_policy_gradient(name, mode):
    # At ratio 1 no gate or clip acts. GMPO spreads a sequence's advantage over its tokens: give each sequence one.
    x, others, mask = random_batch()
    advantages, weights = others[1][:, :1].expand_as(x), others[2][:, :1].exp().expand_as(x)
    function, settings = POLICY_LOSSES[name]
    loss, metrics = function(
        x, x.detach().clone(), advantages, mask, behavior_weights=weights, aggregation=mode, **settings
    )
    loss.backward()
    (expected,) = torch.autograd.grad(package.aggregate(-advantages * weights * x, mask, mode), x)
    torch.testing.assert_close(x.grad, expected)
    assert metrics["ratio_mean"].item() == metrics["ratio_max"].item() == 1.0
    assert metrics["approx_kl"].item() == metrics.get("clip_fraction", torch.zeros(())).item() == 0.0


@every_policy_loss
def test_behavior_weights_of_one_change_nothing_and_scale_the_loss(name):
    x, others, mask = random_batch()
    function, settings = POLICY_LOSSES[name]
    plain, _ = function(x, others[0], others[1], mask, **settings)
    for weight in (1.0, 0.0, 4.0):
        weights = torch.full_like(x, weight)
        weighted, _ = function(x, others[0], others[1], mask, behavior_weights=weights, **settings)
        torch.testing.assert_close(weighted, weight * plain)


@every_policy_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    x, others, mask = random_batch()
    half = [tensor.detach().to(dtype) for tensor in (x, *others)]
    logprobs = half[0].clone().requires_grad_()
    loss, metrics = policy(name)(logprobs, half[1:], mask)
    # The weights of `policy` are an exponential, which is taken in the dtype that it is given.
    weights = half[3].exp().float()
    full, full_metrics = policy(name)(half[0].float(), [half[1].float(), half[2].float(), weights.log()], mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logprobs.grad.dtype == dtype
    torch.testing.assert_close(loss.detach(), full)
    torch.testing.assert_close(metrics, full_metrics)


@every_policy_loss
@pytest.mark.parametrize("difference", [100.0, 1e4, 1e30, -100.0, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_huge_log_ratio_stays_finite(name, difference, advantage):
    # The difference lies in the old log-probability: that of the policy itself is always moderate.
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old_logprobs, advantages = torch.tensor([[-1.0 - difference, -1.0]]), torch.full((1, 2), advantage)
    function, settings = POLICY_LOSSES[name]
    loss, metrics = function(logprobs, old_logprobs, advantages, torch.ones(1, 2), **settings)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(metric.item()) for metric in metrics.values())


@every_policy_loss
def test_a_nan_that_counts_is_not_hidden(name):
    x, others, mask = random_batch()
    function, settings = POLICY_LOSSES[name]
    for position in range(3):
        tensors = [tensor.detach().clone() for tensor in (x, others[0], others[1])]
        tensors[position][3, 2] = math.nan  # row 3 is unmasked
        assert math.isnan(function(*tensors, mask, **settings)[0].item())
