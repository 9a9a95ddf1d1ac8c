"""vLLM's two ends of a publication on one GPU and what lies between them, with recorded CUDA memory."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

from rlhf_ray.types import LoadReport
from rlhf_ray.weight_sync import ipc as module
from rlhf_ray.weight_sync.ipc import IpcSender
from rlhf_ray.weight_sync.manifest import joined_names
from rlhf_ray.weight_sync.nccl import ReplicaClient, ShardedSource
from rlhf_ray.weight_sync.shared_memory_engine import IpcTransferEngine

CPU = torch.device("cpu")
WEIGHTS = {"embed": torch.randn(6, 4), "norm": torch.randn(4), "up": torch.randn(9, 4), "down": torch.randn(4, 9)}


class OnCpu:
    """``torch``, whose GPU is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, device: str, **options: Any) -> torch.Tensor:
        assert device == "cuda"
        return torch.empty(*size, **options)


class Model(nn.Module):  # type: ignore[misc]
    """Remembers what it is given, as it is when the update ends."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, torch.Tensor]] = []

    def load_weights(self, weights: Any) -> None:
        self.given += list(weights)


class Replicas:
    """A Serve handle over engines, each on a GPU of its own."""

    def __init__(self, *names: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.engines: dict[str, IpcTransferEngine] = {}
        for name in names:
            config = SimpleNamespace(parallel_config=None, model_config=None)
            self.engines[name] = IpcTransferEngine(None, config, torch.device("cpu", 0), Model())

    def broadcast(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        for name, engine in self.engines.items():
            if method == "init_weight_transfer":
                engine.init_transfer_engine(engine.parse_init_info(arguments[0][name]))
            elif method == "apply_update":
                engine.update_weights(arguments[0])
            else:
                {"begin_update": engine.start_weight_update, "finish_update": engine.finish_weight_update}[method]()
        reports = [LoadReport(replica_id=name, version=0, pause_s=0.0) for name in self.engines]
        return SimpleNamespace(results=lambda **_: reports)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, torch.Tensor]:
    """CUDA memory by the handle that opens it, and all that vLLM asks of the one GPU."""
    memory: dict[bytes, torch.Tensor] = {}

    def export(tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
        handle = uuid.uuid4().bytes
        memory[handle] = tensor
        # The device's index is the seventh, as it is with torch.
        return None, (torch.Tensor, tensor.shape, tensor.stride(), 0, torch.UntypedStorage, tensor.dtype, 3, handle)

    def rebuild(*arguments: Any) -> torch.Tensor:
        assert arguments[6] == 0, "the index on the receiver's side"
        return memory[arguments[7]]

    gpu = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(packed_tensor, "torch", OnCpu())
    monkeypatch.setattr(packed_tensor, "reduce_tensor", export)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(f"vllm.model_executor.model_loader.reload.{name}", lambda *_: None)
    return memory


def sender_to(replicas: Replicas, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> IpcSender:
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: replicas)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in weights.items()]
    source = ShardedSource(weights.items, shapes, torch.bfloat16, device=CPU, buffers={"table": torch.arange(3)})
    return IpcSender(app_name="app", deployment_name="d", rank=0, source=source, tensor_parallel_size=1)


@pytest.mark.parametrize("buffer_bytes", [60, 100, 1 << 20])
def test_what_a_learner_sends_is_what_the_engine_on_its_gpu_loads(
    buffer_bytes: int, one_gpu: dict[bytes, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEFAULT_BUCKET_BYTES", buffer_bytes)
    replicas = Replicas("a")
    sender = sender_to(replicas, WEIGHTS, monkeypatch)

    for version in (1, 2):
        replicas.engines["a"].model.given.clear()
        sender.send(version, ("a",))

        given = dict(replicas.engines["a"].model.given)
        # All of it, with buffers that were written over meanwhile.
        assert list(given) == [*WEIGHTS, "table"]
        assert all(torch.equal(given[name], tensor.bfloat16()) for name, tensor in WEIGHTS.items())
        assert given["table"].tolist() == [0, 1, 2]
    methods = [method for method, *_ in replicas.calls]
    rounds = methods.count("apply_update") // 2
    assert methods == ["init_weight_transfer", *["begin_update", *["apply_update"] * rounds, "finish_update"] * 2]
    assert rounds == {60: 4, 100: 3}.get(buffer_bytes, 1)
    assert replicas.calls[-1] == ("finish_update", 2)
    # A tensor that is larger than a buffer makes the buffer larger: vLLM would refuse it.
    assert {memory.numel() for memory in one_gpu.values()} == {max(buffer_bytes, 72)}


def test_what_opens_a_buffer_reaches_the_engines_process_as_plain_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    sender_to(replicas, WEIGHTS, monkeypatch).send(1, ("a",))

    ((update,),) = [arguments for method, *arguments in replicas.calls if method == "apply_update"]
    assert isinstance(update["ipc_handles"], bytes)


def test_an_engine_opens_the_buffer_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    sender = sender_to(replicas, WEIGHTS, monkeypatch)

    def of_all_ranks(self: Any, handles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"GPU-0": ("another rank's",), **one, "GPU-2": ("another rank's",)} for one in handles]

    monkeypatch.setattr(ipc_engine.IPCTrainerWeightTransferEngine, "_all_gather_and_merge_handles", of_all_ranks)
    sender.send(1, ("a",))
    assert torch.equal(dict(replicas.engines["a"].model.given)["up"], WEIGHTS["up"].bfloat16())


def test_an_engine_whose_gpu_no_learner_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    sender = sender_to(replicas, WEIGHTS, monkeypatch)

    monkeypatch.setattr(
        ipc_engine.IPCTrainerWeightTransferEngine,
        "_all_gather_and_merge_handles",
        lambda self, handles: [{"GPU-7": ()} for _ in handles],
    )
    with pytest.raises(ValueError, match="IPC handle not found for GPU UUID GPU-1"):
        sender.send(1, ("a",))


def test_a_tied_weight_that_comes_once_is_loaded_under_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    weights = {joined_names(["embed", "again"]): torch.ones(2, 2)}
    sender_to(replicas, weights, monkeypatch).send(1, ("a",))

    assert [name for name, _ in replicas.engines["a"].model.given] == ["embed", "again", "table"]


def test_the_memory_of_a_round_is_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    calls_before: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls_before.append(len(replicas.calls)))
    sender_to(replicas, WEIGHTS, monkeypatch).send(1, ("a",))

    assert replicas.calls[-1][0] == "finish_update"
    assert calls_before == [len(replicas.calls)]


def test_a_closed_sender_connects_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = Replicas("a")
    sender = sender_to(replicas, WEIGHTS, monkeypatch)
    for version in (1, 2):
        sender.send(version, ("a",))
        sender.close()

    assert [method for method, *_ in replicas.calls].count("init_weight_transfer") == 2
    assert isinstance(module.IpcClient(replicas, ["a"], 1), ReplicaClient)
