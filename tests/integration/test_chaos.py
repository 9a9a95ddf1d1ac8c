"""A run on two nodes whose parts are killed at random, driver and nodes included: every group is trained on once.

``RLHF_RAY_CHAOS_FAULTS`` faults (each kind at least once where there are 10 or more), drawn by ``RLHF_RAY_CHAOS_SEED``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from rlhf_ray.checkpoints.checkpoint import CheckpointStore
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.quickstart import CALCULATOR

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(7200)]

FAULTS = int(os.environ.get("RLHF_RAY_CHAOS_FAULTS", "24"))
SEED = int(os.environ.get("RLHF_RAY_CHAOS_SEED", "0"))
HANG = "reward worker that hangs"
RECOVERY_TIMEOUT_S = 300.0
SETTINGS = (
    *(f"{name}={json.dumps(value)}" for name, value in CALCULATOR.items()),
    "data.batch_size=8",
    "environment.num_workers=2",
    "environment.step_timeout_s=5",
    "rollouts.max_staleness=1",
    "rollouts.num_threads=1",
    "learners.num_learners=2",
    "learners.num_threads=1",
    "rewards.timeout_s=5",
    "training.iterations=100000",
    "checkpointing.interval=1",
    "fault_tolerance.max_learner_restarts=1000",
    "fault_tolerance.max_group_retries=10",
    "reporting.tensorboard=false",
)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {RECOVERY_TIMEOUT_S:g} s for {what}"
        time.sleep(0.2)


class Chaos:
    """A run in a process of its own, on a cluster of two nodes, and ways to hurt both."""

    def __init__(self, folder: Path, processes: Callable[[str], list[psutil.Process]]) -> None:
        self._processes = processes
        self.run_dir = folder / "run"
        self.log = folder / "log"
        self._random = random.Random(SEED)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5})
        self._node = self._cluster.add_node(num_cpus=2)
        self._driver = self._start("--run-dir", str(self.run_dir))

    def kinds(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Faults without end: all kinds in a random order, then all of them in another one."""
        kinds: dict[str, Callable[[], None]] = {
            "replica": lambda: self._send("ray::ServeReplica"),
            "engine": lambda: self._send("VLLM::EngineCore"),
            "reward worker": lambda: self._send("ray::SequentialRewardWorker"),
            "environment worker": lambda: self._send("ray::EnvironmentWorker"),
            "environment worker that hangs": lambda: self._send("ray::EnvironmentWorker", signal.SIGSTOP),
            HANG: lambda: self._send("ray::SequentialRewardWorker", signal.SIGSTOP),
            "learner": lambda: self._send("ray::RayTrainWorker"),
            "bridge": lambda: self._send("ray::Bridge"),
            "driver": self._kill_driver,
            "node": self._replace_node,
        }
        while True:
            yield from self._random.sample(sorted(kinds.items()), len(kinds))

    def hurt(self, name: str, fault: Callable[[], None]) -> None:
        """Do it at a random time, and wait until the run has got further."""
        time.sleep(self._random.uniform(0.0, 3.0))
        started = time.monotonic()
        fault()
        self.wait_for_progress(2)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)

    def wait_for_progress(self, iterations: int) -> None:
        for _ in range(iterations):
            before = self.last_row()

            def got_further(before: dict[str, Any] = before) -> bool:
                assert self._driver.poll() is None, f"the run ended:\n{self.log.read_text()[-4000:]}"
                return self.last_row() != before

            wait_for(got_further, "the next iteration")

    def last_row(self) -> dict[str, Any]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            return dict(json.loads(lines[-1]))
        except (IndexError, ValueError):
            return {}

    def end(self) -> int:
        self._driver.terminate()
        return self._driver.wait(timeout=120)

    def stop(self) -> None:
        self._driver.kill()
        self._cluster.shutdown()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rlhf_ray.cli", "train", *words, *SETTINGS],
                env=os.environ | {"RAY_ADDRESS": self._cluster.address},
                stdout=log,
                stderr=log,
            )

    def _send(self, title: str, number: int = signal.SIGKILL) -> None:
        wait_for(lambda: self._processes(title), title)
        self._random.choice(self._processes(title)).send_signal(number)

    def _kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()
        self._driver = self._start("--resume", str(self.run_dir))

    def _replace_node(self) -> None:
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=2)


@pytest.fixture
def chaos(tmp_path: Path, processes: Callable[[str], list[psutil.Process]]) -> Iterator[Chaos]:
    if ray.is_initialized():
        ray.shutdown()
    chaos = Chaos(tmp_path, processes)
    yield chaos
    chaos.stop()


def test_every_group_is_trained_on_once_whatever_dies(chaos: Chaos) -> None:
    chaos.wait_for_progress(2)
    hangs = 0
    for _, (name, fault) in zip(range(FAULTS), chaos.kinds(), strict=False):
        chaos.hurt(name, fault)
        hangs += name == HANG
    assert chaos.end() == 143

    checkpoint = CheckpointStore(Folder.at(chaos.run_dir / "checkpoints")).newest()
    assert checkpoint is not None
    state = checkpoint.state()
    steps = [chaos.run_dir / "completions" / f"step_{step + 1:06d}.parquet" for step in range(state.iteration)]
    trained = [group for step in steps for group in set(pq.read_table(step)["group_id"].to_pylist())]
    assert state.prompt_position.epoch == 0
    accounted = [*trained, *state.prompt_position.unfinished]
    assert len(accounted) == len(set(accounted))
    # A reward worker that hangs is one whose function takes too long: its group is dropped. Episodes of an environment
    # worker that hangs as a whole are played again.
    dropped = set(range(state.prompt_position.row)) - set(accounted)
    assert len(dropped) <= hangs
