import doctest
import importlib
import pkgutil

import pytest

import rlhf_ray.losses as package

MODULES = [module.name for module in pkgutil.iter_modules(package.__path__, "rlhf_ray.losses.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_exports_are_sorted_and_documented():
    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name).__doc__ for name in package.__all__)
