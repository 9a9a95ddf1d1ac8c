"""The learner side without a GPU: what is said to whom. Importing it imports vLLM, which takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

pytest.importorskip("vllm")

from rlhf_ray.types import LoadReport
from rlhf_ray.weight_sync import nccl as module
from rlhf_ray.weight_sync.manifest import ReplicaLostError
from rlhf_ray.weight_sync.nccl import NcclSender, ReplicaClient, ShardedSource, rank_offsets


class Broadcast:
    def __init__(self, answers: Sequence[Any]) -> None:
        self._answers = answers

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0
        assert return_exceptions
        return list(self._answers)


class Handle:
    """A Serve handle whose replicas all answer, but for those that fail; one method may wait for an event."""

    def __init__(
        self,
        *replicas: str,
        failing: Mapping[str, BaseException] | None = None,
        holds_up: tuple[str, threading.Event] | None = None,
    ) -> None:
        self._replicas = replicas
        self._failing = failing or {}
        self._holds_up = holds_up
        self.asked: list[tuple[Any, ...]] = []

    def broadcast(self, method: str, *arguments: Any) -> Broadcast:
        self.asked.append((method, *arguments))
        if self._holds_up is not None and method == self._holds_up[0]:
            assert self._holds_up[1].wait(10)
        reports = [LoadReport(replica_id=name, version=0, pause_s=0.0) for name in self._replicas]
        return Broadcast([*reports, *self._failing.values()])


@pytest.mark.parametrize(
    ("replicas", "tensor_parallel_size", "offsets"),
    [
        (["a"], 1, {"a": 1}),
        (["b", "a", "c"], 1, {"a": 1, "b": 2, "c": 3}),
        (["b", "a", "c"], 4, {"a": 1, "b": 5, "c": 9}),
    ],
)
def test_rank_offsets_by_hand(replicas: list[str], tensor_parallel_size: int, offsets: dict[str, int]) -> None:
    assert rank_offsets(replicas, tensor_parallel_size) == offsets


@pytest.mark.parametrize("replicas", [1, 3, 7])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 8])
def test_no_two_workers_claim_the_same_rank(replicas: int, tensor_parallel_size: int) -> None:
    offsets = rank_offsets([f"replica-{i}" for i in range(replicas)], tensor_parallel_size)

    ranks = [offset + worker for offset in offsets.values() for worker in range(tensor_parallel_size)]
    # Rank 0 is the sender.
    assert sorted(ranks) == list(range(1, 1 + replicas * tensor_parallel_size))


def test_the_order_of_the_replicas_does_not_matter() -> None:
    """Every learner rank and every publication must agree on it."""
    assert rank_offsets(["b", "a"], 2) == rank_offsets(["a", "b"], 2)


def test_each_replica_joins_under_its_own_offset() -> None:
    handle = Handle("a", "b")
    client = ReplicaClient(handle, ["b", "a"], tensor_parallel_size=2)

    client.init_weight_transfer_engine({"master_address": "10.0.0.1", "rank_offset": 1, "world_size": 5})

    ((method, infos),) = handle.asked
    assert method == "init_weight_transfer"
    assert infos == {
        "a": {"master_address": "10.0.0.1", "rank_offset": 1, "world_size": 5},
        "b": {"master_address": "10.0.0.1", "rank_offset": 3, "world_size": 5},
    }


def test_a_round_names_the_version() -> None:
    handle = Handle("a")
    client = ReplicaClient(handle, ["a"], tensor_parallel_size=1)
    client.version = 7

    client.start_weight_update()
    client.update_weights({"names": ["w"]})
    client.finish_weight_update()
    client.finish_weight_update("8")

    assert handle.asked == [
        ("begin_update",),
        ("apply_update", {"names": ["w"]}),
        ("finish_update", 7),
        ("finish_update", 8),
    ]


def test_a_replica_that_is_missing_in_a_round_is_an_error() -> None:
    """A broadcast passes dead replicas over in silence, and the collective would wait for them for ever."""
    client = ReplicaClient(Handle("a", "new"), ["a", "b"], tensor_parallel_size=1)

    with pytest.raises(ReplicaLostError, match="replicas b did not answer begin_update"):
        client.start_weight_update()


def test_a_replica_that_refuses_is_no_death() -> None:
    client = ReplicaClient(Handle("a", failing={"b": ValueError("no such layer")}), ["a", "b"], tensor_parallel_size=1)

    with pytest.raises(ValueError, match="no such layer"):
        client.start_weight_update()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where this process would have ended."""
    ended = threading.Event()
    monkeypatch.setattr(module, "_WATCH_S", 0.02)
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    return ended


def connected(handle: Handle, monkeypatch: pytest.MonkeyPatch, *, connect: Any, send: Any, tell: Any) -> NcclSender:
    """A sender whose collectives are functions of a test."""

    def trainer_init(info: Any, *, client: ReplicaClient, source: Any) -> Any:
        connect(client)
        return SimpleNamespace(client=client, send_weights=lambda: send(client), shutdown=lambda: None)

    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: handle)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(module, "NCCLTrainerWeightTransferEngine", SimpleNamespace(trainer_init=trainer_init))
    source = ShardedSource(lambda: [], [], torch.float32, device=torch.device("cpu"))
    return NcclSender(app_name="app", deployment_name="d", rank=0, source=source, tensor_parallel_size=1, tell=tell)


def nothing(client: ReplicaClient) -> None:
    """A collective that is over at once."""


@pytest.mark.parametrize("where", ["connect", "send"])
@pytest.mark.parametrize("how", ["died", "raised", "late"])
def test_a_collective_that_lost_a_peer_ends_the_process_that_would_wait_for_ever(
    where: str, how: str, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    failing = {"died": {"b": RayActorError()}, "raised": {"b": ValueError("size mismatch for w")}, "late": {}}[how]
    replicas = ("a",) if how == "died" else ("a", "b")
    if how == "late":
        monkeypatch.setattr(module, "_START_TIMEOUT_S", 0.1)
        monkeypatch.setattr(module, "_TIMEOUT_S", 0.1)

    def hang(client: ReplicaClient) -> None:
        with ThreadPoolExecutor(1) as thread:
            call = {"connect": client.init_weight_transfer_engine, "send": client.update_weights}[where]
            asked = thread.submit(call, {})
        assert ended.wait(10), "it waits for a peer that will never come"
        if how != "late":
            asked.result()

    sender = connected(
        Handle(*replicas, failing=failing),
        monkeypatch,
        connect=hang if where == "connect" else nothing,
        send=hang if where == "send" else nothing,
        tell=told.append,
    )
    if how == "late":
        sender.send(3, ("a", "b"))
    else:
        error, said = (ReplicaLostError, "replicas b did") if how == "died" else (ValueError, "size mismatch for w")
        with pytest.raises(error, match=said):
            sender.send(3, ("a", "b"))
    # The process of the test lives on, and is told so again.
    message = told[0]
    assert message.startswith("connecting" if where == "connect" else "sending version 3")
    assert {"died": "replicas b", "raised": "size mismatch for w", "late": "not done within"}[how] in message


@pytest.mark.parametrize("where", ["connect", "send", "nowhere"])
def test_the_training_thread_stays_in_its_stream(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's communicator makes a stream of its own the current one; memory that was cached in the other is lost there.
    streams = ["training"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def communicate(here: str) -> Any:
        return lambda client: torch.cuda.set_stream("vLLM's") if here == where else None

    sender = connected(
        Handle("a"), monkeypatch, connect=communicate("connect"), send=communicate("send"), tell=lambda text: None
    )
    sender.send(3, ("a",))

    assert torch.cuda.current_stream() == "training"
    assert ("vLLM's" in streams) == (where != "nowhere")


def test_an_error_leaves_the_training_thread_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["training"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def fail(client: ReplicaClient) -> None:
        torch.cuda.set_stream("vLLM's")
        raise ValueError("no such layer")

    sender = connected(Handle("a"), monkeypatch, connect=fail, send=nothing, tell=lambda text: None)
    with pytest.raises(ValueError, match="no such layer"):
        sender.send(3, ("a",))
    assert streams[-1] == "training"


def test_both_ends_pack_into_buffers_of_256_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    from rlhf_ray.weight_sync.shared_memory_engine import NcclTransferEngine

    handle = Handle("a", "b")
    trainer_engine = module.NCCLTrainerWeightTransferEngine
    sender = connected(handle, monkeypatch, connect=nothing, send=nothing, tell=lambda text: None)
    monkeypatch.setattr(module, "NCCLTrainerWeightTransferEngine", trainer_engine)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=lambda: None))
    monkeypatch.setattr(trainer_engine, "send_weights", lambda self: None)

    sender.send(1, ("a", "b"))

    ((_, infos),) = [call for call in handle.asked if call[0] == "init_weight_transfer"]
    sizes = [NcclTransferEngine.init_info_cls(**info).packed_buffer_size_bytes for info in infos.values()]
    assert sizes == [sender._engine.packed_buffer_size_bytes] * 2 == [256 * 1024**2] * 2


def test_an_error_that_is_raised_in_time_ends_nothing(ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handle = Handle("a", failing={"b": ValueError("no such layer")})
    sender = connected(
        handle, monkeypatch, connect=nothing, send=lambda client: client.start_weight_update(), tell=told.append
    )
    with pytest.raises(ValueError, match="no such layer"):
        sender.send(3, ("a", "b"))
    assert not ended.wait(0.2)
    assert told == []


def test_no_process_ends_while_all_replicas_live(ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    received = threading.Event()
    threading.Timer(0.2, received.set).start()
    handle = Handle("a", "new", holds_up=("apply_update", received))
    sender = connected(
        handle, monkeypatch, connect=nothing, send=lambda client: client.update_weights({}), tell=lambda text: None
    )
    sender.send(3, ("a",))
    assert [method for method, *_ in handle.asked].count("status") > 1
    assert not ended.is_set()


def test_a_replica_that_is_out_of_reach_for_a_moment_is_not_lost(
    ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ReplicaClient(Handle("a"), ["a"], 1)
    looks = iter([["a"], [], ["a"]])
    monkeypatch.setattr(client, "missing", lambda: next(looks, []))
    with module._watching(client, "sending", limit_s=60.0, tell=lambda text: None):
        assert not ended.wait(0.2)


def test_replicas_that_cannot_be_asked_for_a_moment_are_not_lost(
    ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ReplicaClient(Handle("a"), ["a"], 1)
    monkeypatch.setattr(client, "missing", lambda: 1 / 0)
    with module._watching(client, "sending", limit_s=60.0, tell=lambda text: None):
        assert not ended.wait(0.2)


def test_a_replica_that_has_come_since_is_none_of_a_rounds_business() -> None:
    ReplicaClient(Handle("new", "a"), ["a"], tensor_parallel_size=1).start_weight_update()


def test_buffers_are_sent_after_the_parameters_in_their_own_type() -> None:
    buffers = {"bias": torch.arange(3.0), "table": torch.arange(2)}
    source = ShardedSource(
        lambda: [("embed", torch.ones(2))],
        [("embed", (2,))],
        torch.bfloat16,
        device=torch.device("cpu"),
        buffers=buffers,
    )

    described = [(meta.name, meta.dtype, tuple(meta.shape)) for meta in source.metadata()]
    assert described == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert described[1:] == [("bias", torch.float32, (3,)), ("table", torch.int64, (2,))]
    assert source.size_bytes() == 2 * 2 + 3 * 4 + 2 * 8


def test_source_gives_every_parameter_in_the_wire_type() -> None:
    parameters = [("embed", torch.ones(2, 3)), ("norm", torch.zeros(5, requires_grad=True))]
    source = ShardedSource(
        lambda: parameters, [("embed", (2, 3)), ("norm", (5,))], torch.bfloat16, device=torch.device("cpu")
    )

    assert [(meta.name, meta.dtype, tuple(meta.shape)) for meta in source.metadata()] == [
        ("embed", torch.bfloat16, (2, 3)),
        ("norm", torch.bfloat16, (5,)),
    ]
    assert source.size_bytes() == 2 * (6 + 5)
    found = list(source)
    assert [(name, tensor.dtype, tensor.requires_grad) for name, tensor in found] == [
        ("embed", torch.bfloat16, False),
        ("norm", torch.bfloat16, False),
    ]
    assert found[0][1].tolist() == [[1.0] * 3] * 2
