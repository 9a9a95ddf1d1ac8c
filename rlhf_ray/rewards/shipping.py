"""Rewards, on the way to their workers: reward functions as bytes that any worker can read."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from ray import cloudpickle

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.functions import NamedReward

__all__ = ["pack", "pack_rewards", "unpack", "unpack_rewards"]

# What is carried by value is the same for all threads: one must not end that while another one pickles.
_PICKLING = threading.RLock()


def pack_rewards(rewards: Sequence[NamedReward]) -> tuple[bytes, ...]:
    """One parcel a reward.

    Raises:
        ConfigError: A function holds something that cannot be sent to another process.
    """
    return tuple(_pack_reward(reward) for reward in rewards)


def unpack_rewards(parcels: Sequence[bytes]) -> tuple[NamedReward, ...]:
    """The rewards of :func:`pack_rewards`."""
    return tuple(cast(NamedReward, unpack(parcel)) for parcel in parcels)


def pack(value: object, *, defined_by: object) -> bytes:
    """Pickle ``value``; code of the module that defines ``defined_by`` goes along where workers cannot import it.

    This process's module path goes along too, as with Python's own ``multiprocessing``.
    """
    with _carried_by_value(defined_by):
        parcel: bytes = cloudpickle.dumps(value)
    return pickle.dumps(([os.path.abspath(entry) for entry in sys.path], parcel))


def unpack(parcel: bytes) -> object:
    """The value of :func:`pack`."""
    path, inner = pickle.loads(parcel)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    return cloudpickle.loads(inner)


def _pack_reward(reward: NamedReward) -> bytes:
    try:
        return pack(reward, defined_by=reward.function)
    except Exception as error:  # Pickling runs the __reduce__ of whatever the function holds.
        raise ConfigError(
            "rewards.functions",
            reward.name,
            f"cannot be sent to a reward worker ({type(error).__name__}: {error}); make what it holds inside it",
        ) from error


@contextmanager
def _carried_by_value(value: object) -> Iterator[None]:
    """Within, cloudpickle writes out the module of ``value`` instead of naming it, where only this process has it."""
    names = {name for name in _module_names(value) if not _importable(name)}
    modules = [sys.modules[name] for name in names if name in sys.modules]
    with _PICKLING:
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)


def _module_names(value: object) -> set[str]:
    while isinstance(value, functools.partial):
        value = value.func
    inner = inspect.unwrap(value) if callable(value) else value
    owners = (value, type(value), inner, type(inner), getattr(inner, "__self__", None))
    return {name for owner in owners if isinstance(name := getattr(owner, "__module__", None), str)} - {"__main__"}


def _importable(module_name: str) -> bool:
    """Whether a fresh process with this one's path could import the module: not one loaded from a lone file."""
    top = module_name.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)
