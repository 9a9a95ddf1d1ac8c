import math

import pytest

from rlhf_ray.advantages import AdaptiveKLController


def controller(init_coef=0.5, target=4.0, horizon=100.0):
    return AdaptiveKLController(init_coef=init_coef, target=target, horizon=horizon)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # Gain 50 / 100 = 0.5. 4.4 / 4 - 1 = 0.1: 0.5 * (1 + 0.1 * 0.5) = 0.525; 3.6 / 4 - 1 = -0.1: 0.5 * 0.95
        (4.4, 0.525),
        (3.6, 0.475),
        (4.0, 0.5),
        # Clipped to 0.2 and -0.2: 0.5 * 1.1 and 0.5 * 0.9
        (400.0, 0.55),
        (0.0, 0.45),
        (-1.0, 0.45),
    ],
)
def test_hand_computed(kl, expected):
    adaptive = controller()
    adaptive.update(kl, 50)
    assert adaptive.coef == pytest.approx(expected, rel=1e-12)


def test_equals_published_numbers():
    # SkyRL (github.com/NovaSky-AI/SkyRL), test_ppo_utils.py: an error of 1, clipped to 0.2; 0.2 * (1 + 0.2 * 10 / 100).
    adaptive = controller(init_coef=0.2, target=0.1, horizon=100.0)
    adaptive.update(0.2, 10)
    assert adaptive.coef == pytest.approx(0.204, rel=1e-12)


def test_updates_compound():
    adaptive = controller()
    for _ in range(3):
        adaptive.update(8.0, 50)
    assert adaptive.coef == pytest.approx(0.5 * 1.1**3, rel=1e-12)


def test_finds_the_coefficient_that_brings_about_the_target():
    # A policy whose KL is 1 / coef: the target of 4 needs a coefficient of 0.25.
    adaptive = controller(init_coef=5.0)
    for _ in range(300):
        adaptive.update(1.0 / adaptive.coef, 50)
    assert adaptive.coef == pytest.approx(0.25, rel=1e-6)


def test_continues_from_a_checkpoint():
    straight, first = controller(), controller()
    for adaptive in (straight, first):
        adaptive.update(4.4, 50)
    resumed = controller(init_coef=9.0)
    resumed.load_state_dict(first.state_dict())
    for adaptive in (straight, resumed):
        adaptive.update(3.9, 30)
    assert resumed.coef == straight.coef
    assert resumed.state_dict() == {"coef": straight.coef}


def test_coefficient_stays_positive_for_the_largest_gain():
    adaptive = controller()
    adaptive.update(0.0, 499)
    assert 0.0 < adaptive.coef < 0.5
    with pytest.raises(ValueError, match=r"num_samples = 500: must be below 5 \* horizon = 500"):
        adaptive.update(0.0, 500)


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["init_coef", "target", "horizon"])
def test_arguments_that_are_not_positive_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name} = {number}: must be positive and finite"):
        controller(**{name: number})


def test_refused_update_or_state_changes_nothing():
    adaptive = controller()
    for kl in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"kl = {kl}: must be finite"):
            adaptive.update(kl, 50)
    with pytest.raises(ValueError, match="num_samples = 0: must be positive"):
        adaptive.update(4.0, 0)
    with pytest.raises(ValueError, match=r"coef = -1\.0: must be positive"):
        adaptive.load_state_dict({"coef": -1.0})
    assert adaptive.coef == 0.5
