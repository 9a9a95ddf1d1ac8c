"""Kept states without Ray: their files, their memory, and what a killed process leaves."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from learner_scenarios import RESUMED, SCENARIOS
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import rlhf_ray
from rlhf_ray.learner import kept_state as module
from rlhf_ray.learner.kept_state import KeptState, StateFile
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.remote.state_keeper import StateKeeper
from rlhf_ray.learner.remote.train_loop import _Worker

MEMORY_NAME = "rlhf-ray-learner-state"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of more than four numbers takes several."""
    monkeypatch.setattr(module, "_PIECE_BYTES", 16)


def state_of(version: int) -> dict[str, torch.Tensor]:
    """Of several types, one of them empty here."""
    return {
        "weights": torch.arange(15.0).view(3, 5) + version,
        "steps": torch.tensor([version]),
        "coefficient": torch.tensor([0.1 * version], dtype=torch.float64),
        "half": torch.full((7,), version, dtype=torch.bfloat16),
        "none": torch.empty(0),
    }


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}


def read(kept: KeptState, version: int) -> dict[str, torch.Tensor]:
    tensors = blank()
    kept.read(version, tensors)
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def keeping(*versions: int, count: int = 2) -> KeptState:
    kept = KeptState(count)
    for version in versions:
        kept.begin(version, state_of(version))
    return kept


def test_the_two_newest_versions_are_kept_bit_for_bit() -> None:
    kept = keeping(1, 4, 7)
    assert sorted(kept.versions) == [4, 7]
    assert same(read(kept, 7), state_of(7))
    assert same(read(kept, 4), state_of(4))
    assert kept.versions == [4]  # What came after it is another run's by now.
    with pytest.raises(ValueError, match="no state was kept at policy version 7"):
        read(kept, 7)
    kept.begin(5, state_of(5))
    assert sorted(kept.versions) == [4, 5]


def test_a_version_can_be_spared() -> None:
    kept = keeping(1, 2)
    kept.begin(3, state_of(3), spare=1)
    assert sorted(kept.versions) == [1, 3]
    kept.begin(4, state_of(4), spare=1)
    assert sorted(kept.versions) == [1, 4]


def test_a_state_of_another_model_is_not_taken() -> None:
    kept = keeping(1)
    with pytest.raises(ValueError, match="of another model"):
        kept.read(1, blank() | {"weights": torch.zeros(5, 3)})


def test_the_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    kept = keeping(3)
    kept.wait()
    kept._files[0].copy_to(str(tmp_path / "file"))
    wanted = state_of(3)
    del wanted["none"]
    assert same(load_file(tmp_path / "file"), wanted)


def test_a_copy_that_fails_costs_its_version_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keeping(1, 2)
    kept.wait()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_all", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        kept.begin(3, state_of(3))
        assert kept.versions == [2]
    assert "policy version 3 is not kept: OSError('No space left on device')" in caplog.text
    kept.begin(4, state_of(4))
    assert sorted(kept.versions) == [2, 4]


def test_memory_that_is_taken_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in state_of(0).values())
    left = [1_000_000 + 2 * size, 1_000_000 + size]  # The first version is in memory when the second one asks.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(module, "host_memory", lambda: (10_000_000, left.pop(0)))
    kept = keeping(1, 2)
    assert [MEMORY_NAME in os.readlink(path) for path in kept.paths()] == [True, True]


def test_where_memory_is_short_the_state_lies_on_disk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    size = sum(tensor.nbytes for tensor in state_of(0).values())
    # Two versions of four ranks, then one, and a tenth stays free: a byte is missing.
    left = [1_000_000 + 8 * size - 1, 1_000_000 + 4 * size - 1]
    monkeypatch.setattr(module, "host_memory", lambda: (10_000_000, left.pop(0)))
    kept = keeping(1, 2)
    assert same(read(kept, 2), state_of(2))
    assert not any(MEMORY_NAME in os.readlink(path) for path in kept.paths())
    assert caplog.text.count("memory has no room for it") == 2


def allocated(kept: KeptState) -> int:
    return sum(os.stat(path).st_blocks * 512 for path in kept.paths())


def test_memory_is_two_versions_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    number = 1_000_000
    state = {name: torch.ones(number) for name in ("weights", "exp_avg", "exp_avg_sq")}
    kept = KeptState(2)
    for version in range(5):
        file = kept.begin(version, state)
    kept.wait()
    file.copy_to(str(tmp_path / "checkpoint"))
    assert allocated(kept) <= 24 * number + 2**16
    assert all(MEMORY_NAME in os.readlink(path) for path in kept.paths())
    assert kept._staging is None
    file.free()
    assert allocated(kept) <= 12 * number + 2**16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """On the CPU: all tensors count as those of a GPU, the order of whose copies is checked."""
    return SimulatedGpu(monkeypatch)


class SimulatedGpu:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited: list[Any] = []
        self.copies: list[Any] = []
        """Begun, and done where true."""
        self.made_outside: list[torch.Size] = []
        """Shapes of what was made contiguous in another stream than that of the copies."""
        waited, copies, made_outside, within = self.waited, self.copies, self.made_outside, [False]

        class Stream:
            def wait_stream(self, other: Any) -> None:
                waited.append(other)

            def synchronize(self) -> None:
                for index, begun in enumerate(copies):
                    if callable(begun):
                        begun()
                        copies[index] = True

            def __enter__(self) -> None:
                within[0] = True

            def __exit__(self, *_: Any) -> None:
                within[0] = False

        class Buffer(torch.Tensor):
            """Copies into it arrive when the stream is waited for, as on a GPU."""

            def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Buffer:  # type: ignore[override]
                assert non_blocking
                assert within[0]
                target = self
                copies.append(lambda: torch.Tensor.copy_(target, source))
                return self

        def contiguous(tensor: torch.Tensor, make: Any = torch.Tensor.contiguous) -> torch.Tensor:
            if not tensor.is_contiguous() and not within[0]:
                made_outside.append(tensor.shape)
            return make(tensor)

        monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "training")
        monkeypatch.setattr(module, "_on_device", lambda tensor: True)
        monkeypatch.setattr(module, "_pinned", lambda size: torch.zeros(size, dtype=torch.uint8).as_subclass(Buffer))


def test_tensors_of_a_gpu_come_through_a_buffer(gpu: SimulatedGpu) -> None:
    kept = keeping(1, 2)
    assert same(read(kept, 2), state_of(2))
    assert same(read(kept, 1), state_of(1))
    assert gpu.waited == ["training", "training"]
    assert len(gpu.copies) == 2 * (4 + 1 + 1 + 1)


def test_what_a_gpu_makes_for_a_copy_is_made_in_the_stream_of_the_copy(gpu: SimulatedGpu, tmp_path: Path) -> None:
    kept, transposed = KeptState(), torch.arange(12.0).view(3, 4).T
    kept.write(str(tmp_path / "file"), {"transposed": transposed}, 1).result()
    assert torch.equal(load_file(tmp_path / "file")["transposed"], transposed)
    assert gpu.made_outside == []


def open_states(*processes: int) -> int:
    """Memory of kept states that this process, and others, have open."""
    found = 0
    for process in (os.getpid(), *processes):
        for path in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):
                found += MEMORY_NAME in os.readlink(path)
    return found


KILLED = """
import json, os, signal, sys, torch
from rlhf_ray.learner import kept_state as module
def state_of(version):
    return {"weights": torch.arange(15.0).view(3, 5) + version}
kept = module.KeptState(2)
for version in (1, 2):
    kept.begin(version, state_of(version))
kept.wait()
print(json.dumps(kept.paths()), flush=True)
sys.stdin.readline()
write, left = module._write_all, [3]
def dying(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
module._write_all, module._PIECE_BYTES = dying, 16
kept.begin(3, state_of(3))
kept.wait()
"""


def test_a_process_that_is_killed_in_a_copy_leaves_the_version_before_and_no_memory_for_good() -> None:
    gc.collect()
    before = open_states()
    environment = os.environ | {"PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    keeper = StateKeeper()
    paths = json.loads(child.stdout.readline())
    for _ in range(2):  # The same files again: nothing is opened twice.
        asyncio.run(keeper.hold_state(0, paths))
    assert open_states(child.pid) == before + 4
    child.communicate("die\n")
    assert child.returncode == -9
    assert open_states() == before + 2

    kept = KeptState(2)
    kept.adopt(asyncio.run(keeper.held_state(0)))
    assert kept.versions == [2]
    weights = {"weights": torch.zeros(3, 5)}
    kept.read(2, weights)
    assert torch.equal(weights["weights"], state_of(2)["weights"])
    kept.begin(3, weights)
    assert sorted(kept.versions) == [2, 3]
    kept._files.clear()
    asyncio.run(keeper.hold_state(0, []))
    assert asyncio.run(keeper.held_state(0)) == []
    assert open_states() == before


# Of learners.


@pytest.fixture
def make_learner(models: Path, one_rank: None) -> Callable[..., Learner]:
    def make(kept: KeptState | None = None, scenario: runs.Scenario = RESUMED) -> Learner:
        return Learner(runs.make_spec(models, scenario), kept)

    return make


def assert_same_state(first: Learner, second: Learner) -> None:
    assert runs.same_state(first.state(), second.state())


@pytest.mark.parametrize("kept_at", [1, 3])
def test_an_older_state_and_the_updates_since_then_are_the_newest_state_bit_for_bit(
    kept_at: int, make_learner: Callable[..., Learner]
) -> None:
    first = make_learner(kept := KeptState(2))
    for number in range(3):
        if number == kept_at:
            first.keep_state(number)
        runs.update(first, RESUMED, number)
    if kept_at == 3:
        first.keep_state(3)
    kept.wait()

    second = make_learner(other := KeptState(2))
    other.adopt(kept.paths())
    second.recall(kept_at)
    for number in range(kept_at, 3):
        runs.update(second, RESUMED, number)

    assert_same_state(first, second)
    assert second.policy.lr == first.policy.lr


def test_weights_do_not_change_while_they_are_copied(
    make_learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(kept := KeptState(2))
    runs.update(learner, RESUMED, 0)
    before = runs.full_weights(learner.policy)
    may_copy, estimated = threading.Event(), threading.Event()
    write = module._write_tensors
    monkeypatch.setattr(module, "_write_tensors", lambda *arguments: (may_copy.wait(30), write(*arguments)))
    monkeypatch.setattr(learner, "_change", lambda change=learner._change: (estimated.set(), change()))

    learner.keep_state(1)
    updating = threading.Thread(target=runs.update, args=(learner, RESUMED, 1))
    updating.start()
    assert estimated.wait(30), "the passes before the first step need not wait"
    updating.join(0.3)
    assert updating.is_alive()
    assert all(torch.equal(before[name], one) for name, one in runs.full_weights(learner.policy).items())
    may_copy.set()
    updating.join(30)

    assert not torch.equal(before["model.norm.weight"], runs.full_weights(learner.policy)["model.norm.weight"])
    learner.recall(1)
    assert all(torch.equal(before[name], one) for name, one in runs.full_weights(learner.policy).items())
    assert kept.versions == [1]


@pytest.mark.parametrize("begin", [lambda learner, _: learner.keep_state(1), Learner.save])
def test_weights_do_not_leave_the_device_while_they_are_copied(
    begin: Callable[[Learner, str], Any],
    make_learner: Callable[..., Learner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = SCENARIOS["lora"]  # Whose frozen weights a checkpoint takes without a copy.
    learner = make_learner(KeptState(2), replace(lora, spec=lora.spec | {"keeps_state": True}))
    runs.update(learner, lora, 0)
    before, sizes = copy.deepcopy(learner.state()), runs.device_bytes(learner)
    may_copy, write = threading.Event(), module._write_tensors
    monkeypatch.setattr(module, "_write_tensors", lambda *arguments: (may_copy.wait(30), write(*arguments)))

    begin(learner, str(tmp_path))
    leaving = threading.Thread(target=learner.offload)
    leaving.start()
    leaving.join(0.3)
    assert leaving.is_alive()
    assert runs.device_bytes(learner) == sizes
    may_copy.set()
    leaving.join(30)

    assert learner.is_offloaded
    learner.onload()
    assert runs.same_state(before, learner.state())
    file = learner.keep_state(1)
    assert file.version == (1 if begin is not Learner.save else 0)
    learner.recall(file.version)
    assert runs.same_state(before, learner.state())


class Gate:
    """Holds up what is written of states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.open = self._open.set
        write = module._write_tensors
        monkeypatch.setattr(module, "_write_tensors", lambda *arguments: (self._open.wait(30), write(*arguments)))


@pytest.fixture
def colocated_rank(models: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Worker]:
    """A rank that takes turns with an engine, after an update to version 1."""

    def make(*, keeps_state: bool = True) -> _Worker:
        for method in ("_adopt_state", "_hold_state"):
            monkeypatch.setattr(_Worker, method, lambda _: None)
        spec = runs.make_spec(models, replace(RESUMED, spec={"keeps_state": keeps_state, "colocated": True}))
        worker = _Worker(spec, object(), 0)
        runs.update(worker._learner, RESUMED, 0)
        worker.version = 1
        return worker

    return make


def in_time(work: Callable[[], object]) -> bool:
    """Whether it ends by itself."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_rank_leaves_its_gpu_at_once_and_its_state_is_copied_from_host_memory(
    colocated_rank: Callable[..., _Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, gate = colocated_rank(), Gate(monkeypatch)
    learner, before = worker._learner, copy.deepcopy(worker._learner.state())
    worker._to_keep = 1, None
    worker.begin_to_keep()
    assert in_time(worker.offload)
    assert learner.is_offloaded
    assert all(file.version is None for file in worker._kept._files)

    learner.onload()  # Engines were fast: the next update begins, whose steps wait for the copy.
    updating = threading.Thread(target=runs.update, args=(learner, RESUMED, 1))
    updating.start()
    updating.join(0.3)
    assert updating.is_alive()
    gate.open()
    updating.join(30)
    assert worker._kept.versions == [1]
    assert not runs.same_state(before, learner.state())
    learner.recall(1)
    assert runs.same_state(before, learner.state())


def test_host_memory_is_not_used_again_before_the_copy_of_it_is_made(
    colocated_rank: Callable[..., _Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, gate = colocated_rank(), Gate(monkeypatch)
    learner = worker._learner
    worker._to_keep = 1, None
    assert in_time(worker.offload)
    learner.onload()
    leaving = threading.Thread(target=worker.offload)
    leaving.start()
    leaving.join(0.3)
    assert leaving.is_alive()
    assert not learner.is_offloaded
    gate.open()
    leaving.join(30)
    assert learner.is_offloaded
    assert worker._kept.versions == [1]


@pytest.mark.parametrize("copied", ["before", "fails", "never"])
def test_a_checkpoint_of_a_rank_that_takes_turns_holds_its_state(
    copied: str,
    colocated_rank: Callable[..., _Worker],
    make_learner: Callable[..., Learner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy is under way when it is asked for, or failed, or states are not kept."""
    worker = colocated_rank(keeps_state=copied != "never")
    learner, before = worker._learner, copy.deepcopy(worker._learner.state())
    with monkeypatch.context() as patched:
        if copied == "fails":
            patched.setattr(module, "_write_tensors", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
        gate = Gate(patched)
        if copied != "never":
            worker._to_keep = 1, None
            assert in_time(worker.offload)
            learner.onload()
        if copied == "fails":
            gate.open()
            assert worker._kept.versions == []
    gate = Gate(monkeypatch) if copied != "before" else gate
    written = learner.save(str(tmp_path), 1)
    if copied != "before":
        assert in_time(worker.offload)
        assert not written.done()
    gate.open()
    worker.offload()
    written.result(30)
    other = make_learner()
    other.load(str(tmp_path))
    assert runs.same_state(before, other.state())


def test_a_rank_that_is_stopped_in_its_turn_makes_its_copies_first(
    colocated_rank: Callable[..., _Worker], tmp_path: Path
) -> None:
    worker = colocated_rank()
    written = worker._learner.save(str(tmp_path), 1)
    worker.finish()
    written.result(30)


def test_a_copy_does_not_wait_for_the_checkpoint_that_is_written_of_it(
    make_learner: Callable[..., Learner], tmp_path: Path
) -> None:
    """On a busy machine the thread that copies may be slow to start."""
    learner, may_start = make_learner(kept := KeptState()), threading.Event()
    kept._thread.submit(may_start.wait, 30)
    written = learner.save(str(tmp_path))
    may_start.set()
    written.result(10)


def test_a_copy_that_is_being_made_loses_nothing_to_the_next_one(
    gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, entered, may_go, write = KeptState(), threading.Event(), threading.Event(), module._write_all
    monkeypatch.setattr(module, "_write_all", lambda *arguments: (entered.set(), may_go.wait(30), write(*arguments)))
    kept.begin(1, state_of(1))
    assert entered.wait(30)
    written = kept.write(str(tmp_path / "file"), {"weight": torch.ones(3)}, 1)
    may_go.set()
    written.result(30)
    assert same(read(kept, 1), state_of(1))


def test_a_checkpoint_copies_anew_what_could_not_be_kept(
    make_learner: Callable[..., Learner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(kept := KeptState(2), replace(RESUMED, spec={"keeps_state": True}))
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_tensors", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        learner.keep_state(0)
        assert kept.versions == []
    learner.save(str(tmp_path / "one")).result()
    other = make_learner()
    other.load(str(tmp_path / "one"))
    assert_same_state(learner, other)


def test_ranks_that_keep_no_state_do_not_go_back_to_what_a_checkpoint_is_written_of(
    make_learner: Callable[..., Learner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is freed as soon as a rank has written its file: some would have it, others not any more."""
    learner, may_write = make_learner(kept := KeptState()), threading.Event()
    copy_to = StateFile.copy_to
    monkeypatch.setattr(StateFile, "copy_to", lambda *arguments: (may_write.wait(30), copy_to(*arguments)))
    written = learner.save(str(tmp_path))
    worker = object.__new__(_Worker)
    worker._kept, worker._learner, worker._keeps_state = kept, learner, False
    assert kept.versions == [0]
    assert worker._recall(0) is None
    may_write.set()
    written.result()


@pytest.mark.parametrize("way", ["recall", "load"])
def test_a_checkpoint_of_what_was_gone_back_to_is_no_copy_of_what_came_after_it(
    way: str, make_learner: Callable[..., Learner], tmp_path: Path
) -> None:
    learner = make_learner(KeptState(2), replace(RESUMED, spec={"keeps_state": True}))
    runs.update(learner, RESUMED, 0)
    learner.save(str(tmp_path / "one"), version=1).result()
    wanted = copy.deepcopy(learner.state())
    runs.update(learner, RESUMED, 1)
    learner.keep_state(2)
    getattr(learner, way)(1 if way == "recall" else str(tmp_path / "one"))
    assert runs.same_state(wanted, learner.state())

    learner.save(str(tmp_path / "again"), version=1).result()

    other = make_learner()
    other.load(str(tmp_path / "again"))
    assert runs.same_state(wanted, other.state())


@pytest.mark.parametrize("keeps_state", [True, False])
def test_a_checkpoint_takes_the_copy_that_is_kept_or_frees_its_own(
    keeps_state: bool, make_learner: Callable[..., Learner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, begun = KeptState(1 + keeps_state), []
    begin = kept.begin
    monkeypatch.setattr(
        kept, "begin", lambda version, *given, **more: (begun.append(version), begin(version, *given, **more))[1]
    )
    learner = make_learner(kept, replace(RESUMED, spec={"keeps_state": keeps_state}))
    runs.update(learner, RESUMED, 0)
    if keeps_state:
        learner.keep_state(1)
    for folder in ("one", "two"):
        learner.save(str(tmp_path / folder), version=1).result()
    assert begun == ([1] if keeps_state else [1, 1])
    assert kept.versions == ([1] if keeps_state else [])
    assert (allocated(kept) == 0) == (not keeps_state)

    runs.update(learner, RESUMED, 1)
    learner.save(str(tmp_path / "three"), version=2).result()
    assert begun[-1] == 2
    other = make_learner()
    other.load(str(tmp_path / "three"))
    assert_same_state(learner, other)
    other.load(str(tmp_path / "two"))
    assert other.steps_taken == learner.steps_taken / 2


def test_a_version_that_a_checkpoint_is_written_of_is_not_overwritten(tmp_path: Path) -> None:
    """Nor waited for by anything but the copy that would overwrite it."""
    kept, may_read = KeptState(1), threading.Event()
    file = kept.begin(1, state_of(1))
    kept.wait()
    with ThreadPoolExecutor(1) as reader:
        file.reader = reader.submit(lambda: (may_read.wait(30), file.copy_to(str(tmp_path / "file"))))
        kept.begin(2, state_of(2))
        may_read.set()
        assert kept.versions == [2]
    assert torch.equal(load_file(tmp_path / "file")["weights"], state_of(1)["weights"])


@pytest.mark.parametrize("name", ["token_mean", "lora", "critic_warmup"])
def test_a_checkpoint_holds_what_a_distributed_one_of_pytorch_does(
    name: str, make_learner: Callable[..., Learner], tmp_path: Path
) -> None:
    """Files of both load; those of PyTorch's own writer are what earlier versions wrote."""
    learner = make_learner(scenario=SCENARIOS[name])
    runs.update(learner, SCENARIOS[name], 0)
    learner.save(str(tmp_path / "ours")).result()
    state = learner.state() | learner._frozen_state()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True))

    def tensors(folder: str) -> dict[str, torch.Tensor]:
        files = (tmp_path / folder).glob("shard-00001-*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    assert same(tensors("ours"), tensors("theirs"))
    for folder in ("ours", "theirs"):
        other = make_learner(scenario=SCENARIOS[name])
        other.load(str(tmp_path / folder))
        assert_same_state(learner, other)


RANK = """
import hashlib, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import learner_scenarios as runs
import torch, torch.distributed as dist
from pathlib import Path
from rlhf_ray.learner import kept_state as module
from rlhf_ray.learner.initial_weights import local_part
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.remote.train_loop import _Worker

folder, rank, paths = Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
store = folder / ("again" if paths else "first")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
kept = KeptState(2)
learner = Learner(runs.make_spec(folder, runs.RESUMED), kept)

def digest():
    parts = [local_part(one).numpy().tobytes() for one in learner.state().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()

if paths:
    kept.adopt(paths)
    worker = object.__new__(_Worker)
    worker._kept, worker._learner, worker._keeps_state = kept, learner, True
    version = worker._recall(3)
    runs.update(learner, runs.RESUMED, 2)
    print(json.dumps([version, digest()]), flush=True)
    dist.destroy_process_group()
    sys.exit()
for number in range(3):
    runs.update(learner, runs.RESUMED, number)
    if number < 2:
        learner.keep_state(number + 1)
kept.wait()
print(json.dumps([kept.paths(), digest()]), flush=True)
sys.stdin.readline()
write, left = module._write_all, [5]
def dying(*arguments):
    left[0] -= 1
    if rank == 1 and left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
module._write_all = dying
learner.keep_state(3)
print(json.dumps(kept.versions), flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_rank_of_two_that_is_killed_in_a_copy_sends_both_back_and_changes_no_number(
    models: Path, tmp_path: Path
) -> None:
    for name in ("policy", "critic"):
        (tmp_path / name).symlink_to(models / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1])}

    def start(rank: int, paths: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, str(Path(__file__).parent), str(tmp_path), str(rank), json.dumps(paths)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answers(ranks: list[subprocess.Popen[str]]) -> list[Any]:
        return [json.loads(rank.stdout.readline()) for rank in ranks if rank.stdout is not None]

    def proceed(ranks: list[subprocess.Popen[str]]) -> None:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()

    keeper = StateKeeper()
    first = [start(rank, []) for rank in (0, 1)]
    digests = []
    for rank, (paths, digest) in enumerate(answers(first)):
        asyncio.run(keeper.hold_state(rank, paths))
        digests.append(digest)
    proceed(first)
    assert sorted(answers(first[:1])[0]) == [2, 3]
    assert first[1].wait(60) == -9
    first[0].kill()
    first[0].wait(60)

    again = [start(rank, asyncio.run(keeper.held_state(rank))) for rank in (0, 1)]
    assert answers(again) == [[2, digest] for digest in digests]
    for rank in again:
        assert rank.wait(60) == 0
        asyncio.run(keeper.hold_state(again.index(rank), []))
