from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.trained_model import TrainedModel, learning_rate_factor


class TwoLayers(nn.Module):  # type: ignore[misc]
    """A matrix, a bias and a norm; the matrix also under a second, tied name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 1)
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 1, bias=False)
        self.head.weight = self.embed.weight


def trained(model: Any, *, lr: float = 0.1, max_grad_norm: float | None = None, **training: Any) -> TrainedModel:
    simple: dict[str, Any] = {"adam_betas": (0.0, 0.0), "adam_eps": 1.0}
    settings = TrainingSettings(**simple | training)
    return TrainedModel(model, settings, lr=lr, max_grad_norm=max_grad_norm, total_steps=10)


def step(one: TrainedModel) -> float:
    norm = one.grad_norm()
    one.step(norm)
    return float(norm)


def restore(one: TrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Fill its own tensors, as a learner does from a checkpoint."""
    mine = one.state()
    for name, tensor in state.items():
        mine[name].copy_(tensor)
    one.restored(int(mine["steps"]))


def line(weights: list[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False)
    model.weight.data = torch.tensor([weights])
    return model


FACTORS = [
    # schedule, warm-up, total, minimum, step -> factor
    ("constant", 0, 10, 0.0, 0, 1.0),
    ("constant", 0, 10, 0.0, 99, 1.0),
    ("constant", 4, 10, 0.0, 0, 0.25),
    ("constant", 4, 10, 0.0, 3, 1.0),
    ("constant", 4, 10, 0.0, 4, 1.0),
    ("linear", 0, 10, 0.0, 0, 1.0),
    ("linear", 0, 10, 0.0, 5, 0.5),
    ("linear", 0, 10, 0.0, 10, 0.0),
    ("linear", 2, 12, 0.1, 2, 1.0),
    ("linear", 2, 12, 0.1, 7, 0.55),
    ("linear", 2, 12, 0.1, 12, 0.1),
    ("linear", 2, 12, 0.1, 50, 0.1),
    ("linear", 2, 12, 0.1, 1, 1.0),
    ("cosine", 0, 10, 0.0, 0, 1.0),
    ("cosine", 0, 10, 0.0, 5, 0.5),
    ("cosine", 0, 12, 0.0, 4, 0.75),
    ("cosine", 0, 10, 0.2, 10, 0.2),
    ("cosine", 0, 10, 0.2, 11, 0.2),
    # A warm-up as long as the run leaves nothing to decay over.
    ("linear", 10, 10, 0.0, 9, 1.0),
]


@pytest.mark.parametrize(("schedule", "warmup", "total", "minimum", "step", "factor"), FACTORS)
def test_learning_rate_factor_by_hand(
    schedule: str, warmup: int, total: int, minimum: float, step: int, factor: float
) -> None:
    training = TrainingSettings(lr_schedule=schedule, lr_warmup_steps=warmup, min_lr_ratio=minimum)
    found = learning_rate_factor(training, total, step)

    assert found == pytest.approx(factor)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_is_named(moment: str) -> None:
    """The weights may still be finite: the next step would spoil them."""
    model = line([1.0, 2.0])
    one = trained(model)
    model.weight.grad = torch.ones(1, 2)
    step(one)
    assert one.nonfinite() is None
    one._optimizer.state[model.weight][moment][0, 1] = torch.inf

    assert one.nonfinite() == f"{moment} of weight"
    assert one.nonfinite(torch.float32) is None, "moments are not published"


def test_gradient_is_clipped_to_the_norm_and_the_norm_before_is_returned() -> None:
    model = line([1.0, 2.0])
    model.weight.grad = torch.tensor([[3.0, 4.0]])

    norm = step(trained(model, max_grad_norm=1.0))

    assert norm == pytest.approx(5.0)
    # The gradient becomes (0.6, 0.8); Adam without memory divides it by |g| + 1.
    wanted = torch.tensor([[1.0 - 0.1 * 0.6 / 1.6, 2.0 - 0.1 * 0.8 / 1.8]])
    torch.testing.assert_close(model.weight.data, wanted, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 5.5])
def test_gradient_below_the_limit_is_not_scaled(limit: float | None) -> None:
    model = line([1.0, 2.0])
    model.weight.grad = torch.tensor([[3.0, 4.0]])

    norm = step(trained(model, max_grad_norm=limit))

    assert norm == pytest.approx(5.0)
    wanted = torch.tensor([[1.0 - 0.1 * 3.0 / 4.0, 2.0 - 0.1 * 4.0 / 5.0]])
    torch.testing.assert_close(model.weight.data, wanted, rtol=0.0, atol=1e-6)


def test_a_step_clears_the_gradients() -> None:
    model = line([1.0])
    model.weight.grad = torch.ones(1, 1)

    step(trained(model))

    assert model.weight.grad is None


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases() -> None:
    model = TwoLayers()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    step(trained(model, weight_decay=0.5))

    torch.testing.assert_close(model.embed.weight.data, before["embed.weight"] * (1 - 0.1 * 0.5))
    for name in ("embed.bias", "norm.weight", "norm.bias"):
        assert torch.equal(dict(model.named_parameters())[name], before[name])


def test_lr_is_that_of_the_last_step() -> None:
    model = line([1.0])
    one = trained(model, lr=1.0, lr_schedule="linear", lr_warmup_steps=2)
    seen = [one.lr]
    for _ in range(4):
        model.weight.grad = torch.ones(1, 1)
        step(one)
        seen.append(one.lr)

    # Two warm-up steps, then 8 steps down to 0 from the peak.
    assert seen == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.875])


def test_lr_reported_is_the_one_that_was_used() -> None:
    model = line([0.0])
    one = trained(model, lr=1.0, lr_schedule="linear", lr_warmup_steps=4)
    for _ in range(6):
        before = float(model.weight)
        model.weight.grad = torch.ones(1, 1)
        step(one)
        # A gradient of 1 moves the weight by lr * 1 / (1 + eps).
        assert before - float(model.weight) == pytest.approx(one.lr / 2)


def test_a_tied_weight_comes_once_under_all_of_its_names() -> None:
    one = trained(TwoLayers())
    names = [name for name, _ in one.checkpoint.tensors()]

    assert names == ["embed.weight=head.weight", "embed.bias", "norm.weight", "norm.bias"]
    assert [name for name, _ in one.checkpoint.shapes] == names
    assert [name for name, _ in one.checkpoint.tensors(every_name=False)] == ["embed.weight", *names[1:]]


def test_state_of_a_model_that_never_stepped_counts_no_step() -> None:
    model = line([1.0])
    one = trained(model)

    state = one.state()

    assert int(state["steps"]) == 0
    assert float(state["moments.weight.step"]) == 0.0
    assert float(model.weight) == 1.0


def test_state_brings_back_weights_moments_and_schedule() -> None:
    def stepped(one: TrainedModel, model: nn.Linear, gradients: list[float]) -> float:
        for gradient in gradients:
            model.weight.grad = torch.full((1, 1), gradient)
            step(one)
        return float(model.weight)

    settings: dict[str, Any] = {"adam_betas": (0.9, 0.99), "adam_eps": 1e-8, "lr_schedule": "cosine"}
    model = line([1.0])
    one = trained(model, **settings)
    stepped(one, model, [1.0, -2.0])
    state = copy.deepcopy(one.state())
    wanted = stepped(one, model, [0.5, 3.0])

    other = line([7.0])
    restored = trained(other, **settings)
    restore(restored, state)

    second = learning_rate_factor(TrainingSettings(lr_schedule="cosine", min_lr_ratio=0.0), 10, 1)
    assert restored.lr == pytest.approx(0.1 * second)
    assert stepped(restored, other, [0.5, 3.0]) == wanted


def test_a_run_that_goes_on_with_other_settings_uses_them() -> None:
    """A checkpoint restores what was learned; learning rate, decay and betas are the new run's."""
    model = line([1.0])
    before = trained(model, weight_decay=0.5, lr_schedule="constant")
    model.weight.grad = torch.ones(1, 1)
    step(before)

    after = trained(
        line([7.0]), lr=0.2, weight_decay=0.25, adam_betas=(0.5, 0.75), adam_eps=1e-4, lr_schedule="constant"
    )
    restore(after, before.state())

    (group,) = after._optimizer.param_groups
    wanted = {"lr": 0.2, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 1e-4}
    assert {name: group[name] for name in wanted} == wanted


@pytest.mark.usefixtures("one_rank")
def test_a_parameter_that_fsdp_does_not_own_is_no_parameter_to_train() -> None:
    """It would never get a gradient from FSDP, in silence."""
    model = TwoLayers()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params={model.norm.weight})

    with pytest.raises(LearnerError, match="1 parameters of a sharded model are not sharded, norm"):
        trained(model)
