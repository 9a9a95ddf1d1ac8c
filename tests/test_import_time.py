from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rlhf_ray
from rlhf_ray.algorithms import built_in

HEAVY = (
    "accelerate",
    "datasets",
    "numpy",
    "pandas",
    "pyarrow",
    "ray",
    "rich",
    "torch",
    "transformers",
    "vllm",
    "wandb",
)

PROBE = """
import json, sys, time
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def probe(statement: str) -> tuple[float, set[str]]:
    """Run a statement in a fresh interpreter: its CPU seconds, and the top-level modules there afterward."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_the_import_is_light() -> None:
    runs = [probe("from rlhf_ray import PPOConfig") for _ in range(3)]

    assert min(seconds for seconds, _ in runs) < 0.5
    assert not runs[0][1].intersection(HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "from rlhf_ray import PPOConfig; PPOConfig().training(lr=1e-5).validate()",
        "from rlhf_ray import PPOConfig; PPOConfig().schedule().rows()",
        "from rlhf_ray import AlgorithmConfig, PPOConfig; AlgorithmConfig.from_yaml(PPOConfig().to_yaml())",
    ],
)
def test_configuring_imports_no_engine(statement: str) -> None:
    _, modules = probe(statement)

    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize("name, module", [("PPO", "tune.trainables"), ("Algorithm", "tune.trainables")])
def test_algorithm_classes_come_when_asked_for(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType(f"rlhf_ray.{module}")
    setattr(fake, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)

    assert getattr(rlhf_ray, name) is getattr(fake, name)


def test_all_is_complete_and_listed() -> None:
    lazy = set(rlhf_ray._LAZY_MODULES)
    public = {name for name in vars(rlhf_ray) if name[:1].isupper() and name not in ("Any", "TYPE_CHECKING")}
    # For type checkers, which cannot see what is registered.
    source = ast.parse(Path(rlhf_ray.__file__).read_text())
    typed = {alias.asname for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {item.__name__ for item in built_in().values()} == typed - {None, "_built_in"}
    public |= {"register_advantage", "register_loss"}

    assert set(rlhf_ray.__all__) <= set(dir(rlhf_ray))
    assert public | lazy | {"__version__"} == set(rlhf_ray.__all__)


def test_version_is_that_of_the_installed_package() -> None:
    major, minor, *_ = rlhf_ray.__version__.split(".")

    assert int(major) >= 0
    assert int(minor) >= 0


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PPOConfigs'"):
        _ = rlhf_ray.PPOConfigs
