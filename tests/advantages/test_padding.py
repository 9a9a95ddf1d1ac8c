import pytest
import torch

from rlhf_ray.advantages.padding import blank, checked_mask, widened


def test_mask_of_any_dtype_becomes_bool():
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = checked_mask(torch.tensor([[1, 0]], dtype=dtype), ndim=2, x=torch.zeros(1, 2))
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[True, False]]


def test_error_names_every_shape():
    with pytest.raises(ValueError, match=r"shapes differ: values \(2, 3\), returns \(2, 4\), mask \(2, 3\)"):
        checked_mask(torch.ones(2, 3), values=torch.zeros(2, 3), returns=torch.zeros(2, 4))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        checked_mask(torch.ones(2, 3), x=torch.zeros(1, 3))


def test_error_on_wrong_number_of_dimensions():
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); expected 2 dimensions"):
        checked_mask(torch.ones(3), ndim=2)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_blank_stops_values_and_gradients(garbage):
    x = torch.tensor([2.0, garbage], requires_grad=True)
    # The derivative of log at the garbage is NaN or 0; either way nothing of it may come back.
    blank(x.log(), torch.tensor([True, False])).sum().backward()
    assert x.grad[0] == 0.5
    blanked = blank(x, torch.tensor([True, False]))
    assert blanked.tolist() == [2.0, 0.0]
    (gradient,) = torch.autograd.grad(blanked.square().sum(), x)
    assert gradient.tolist() == [4.0, 0.0]


def test_half_precision_is_widened_and_double_precision_is_kept():
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ):
        assert blank(torch.ones(2, dtype=dtype), torch.tensor([True, False])).dtype == expected
        assert widened(torch.ones(2, dtype=dtype)).dtype == expected
