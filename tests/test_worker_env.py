"""No worker sees a GPU that it has not reserved, on a Ray with pretended GPUs."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray

import rlhf_ray
from rlhf_ray.learner.remote import bridge as bridge_module
from rlhf_ray.worker_env import worker_env

HIDES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
# Calls that start processes, or configure what does.
STARTS = ("ray.remote", "serve.deployment", "map_batches", "read_datasource", "RunConfig")


@pytest.mark.parametrize(
    ("gpus", "asked", "env"),
    [
        # A worker without an environment of its own may use a process that Ray has started ahead.
        ({}, {}, {}),
        ({}, {"A": "1"}, {"env_vars": {"A": "1"}}),
        ({"GPU": 2.0}, {}, {"env_vars": HIDES}),
        ({"GPU": 2.0}, {"A": "1"}, {"env_vars": {"A": "1"} | HIDES}),
    ],
)
def test_gpus_are_hidden_where_there_are_some(
    gpus: dict[str, float], asked: dict[str, str], env: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | gpus)
    assert worker_env(**asked) == env


def functions() -> Iterator[tuple[str, str]]:
    """All functions of the package: where, and their code."""
    package = Path(rlhf_ray.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(package)}: {node.name}", ast.unparse(node)


def test_all_that_starts_a_worker_says_what_it_sees() -> None:
    starting = {place: code for place, code in functions() if any(f"{call}(" in code for call in STARTS)}
    assert len(starting) >= 7
    assert [place for place, code in starting.items() if "worker_env(" not in code] == []


@pytest.fixture
def two_gpus(fake_gpus: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    if ray.is_initialized():
        ray.shutdown()
    with fake_gpus():
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_worker_sees_the_gpus_that_it_has_reserved(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing:
        def __init__(self, *_: Any) -> None:
            pass

        def visible(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr(bridge_module, "Bridge", Seeing)
    bridge = bridge_module.bridge_actor(1)
    learner = ray.remote(num_gpus=1, runtime_env=worker_env())(Seeing).remote()
    task = ray.remote(num_cpus=0, runtime_env=worker_env())(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    seen = ray.get([bridge.visible.remote(), learner.visible.remote(), task.remote()], timeout=120)
    assert seen in (["", "0", ""], ["", "1", ""])
