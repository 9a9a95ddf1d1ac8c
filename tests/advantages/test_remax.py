import pytest
import torch

from rlhf_ray.advantages import remax


def test_hand_computed():
    rewards, greedy = torch.tensor([1.0, 0.0, -2.0, 0.5]), torch.tensor([0.25, 0.25, 1.0, 0.5])
    assert remax(rewards, greedy).tolist() == [0.75, -0.25, -3.0, 0.0]


def test_the_baseline_does_not_depend_on_the_other_completions():
    rewards, greedy = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.5, 0.5, 0.5])
    changed = torch.tensor([1.0, 100.0, -7.0])
    assert remax(rewards, greedy)[0] == remax(changed, greedy)[0] == remax(rewards[:1], greedy[:1])[0] == 0.5


def test_results_are_targets_without_gradient_and_new_tensors():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    greedy = torch.tensor([0.5, 0.5], requires_grad=True)
    assert not remax(rewards, greedy).requires_grad
    remax(rewards, greedy).zero_()
    assert rewards.tolist() == [1.0, 2.0]
    assert greedy.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_rewards(dtype):
    assert remax(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)).dtype == dtype


def test_empty_batch():
    assert remax(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "greedy", "message"),
    [
        # These would broadcast.
        ((3,), (1,), r"rewards \(3,\), greedy_rewards \(1,\); expected \[B\] and \[B\]"),
        ((3,), (), r"rewards \(3,\), greedy_rewards \(\)"),
        ((2, 2), (2, 2), r"rewards \(2, 2\), greedy_rewards \(2, 2\)"),
        ((), (), r"rewards \(\), greedy_rewards \(\)"),
        ((3,), (2,), r"rewards \(3,\), greedy_rewards \(2,\)"),
    ],
)
def test_wrong_shapes(rewards, greedy, message):
    with pytest.raises(ValueError, match=message):
        remax(torch.zeros(rewards), torch.zeros(greedy))
