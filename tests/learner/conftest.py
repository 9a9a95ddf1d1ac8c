"""A tiny policy and critic, and a process group of one rank, shared by the tests of learner/."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests import the scenarios by name, and so does each rank's process, which runs that file as a script.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the Hugging Face folders ``policy`` and ``critic``."""
    import learner_scenarios

    folder = tmp_path_factory.mktemp("models")
    learner_scenarios.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo process group of this process alone."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_one_rank(models: Path, one_rank: None) -> Callable[[str], Any]:
    """Run a scenario here, once, each minibatch in one microbatch: what every other split is compared with."""
    import learner_scenarios

    done: dict[str, learner_scenarios.Outcome] = {}

    def outcome(name: str) -> learner_scenarios.Outcome:
        if name not in done:
            done[name] = learner_scenarios.run(learner_scenarios.SCENARIOS[name], models)
        return done[name]

    return outcome
