"""Publication between GPUs: vLLM's NCCL engine, one group of learner rank 0 and every engine worker.

vLLM's trainer engine drives the round inside the learner ranks: all gather, rank 0 broadcasts, the replicas receive.
Its stock client hands every replica the same rank offset, so that two replicas would claim the same ranks;
:class:`ReplicaClient` gives each its own.

A broadcast that has lost a peer never returns, nor does the start of a group. Where a replica dies or fails on the way
rank 0 ends, Ray Train starts the learners again, replicas that stand in the middle of the update are replaced, and the
publication is repeated.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from rlhf_ray.types import LoadReport
from rlhf_ray.weight_sync.buckets import DEFAULT_BUCKET_BYTES, full_tensor
from rlhf_ray.weight_sync.manifest import ReplicaLostError

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

__all__ = ["NcclSender", "ReplicaClient", "ShardedSource", "rank_offsets"]

_LOG = logging.getLogger(__name__)
# vLLM packs tensors into buffers of this size, and says so of each that is larger, such as an embedding.
warnings.filterwarnings("ignore", message=r"Tensor '.*exceeds buffer_size_bytes", category=UserWarning)
_TIMEOUT_S = 600.0
# A rendezvous and one small collective; NCCL itself would wait for a lost peer for ever.
_START_TIMEOUT_S = 180.0
_STATUS_TIMEOUT_S = 30.0
_WATCH_S = 5.0


def rank_offsets(replica_ids: Iterable[str], tensor_parallel_size: int) -> dict[str, int]:
    """First NCCL rank of each replica: the sender is rank 0, then replica after replica."""
    return {name: 1 + index * tensor_parallel_size for index, name in enumerate(sorted(replica_ids))}


class ShardedSource(WeightSource):  # type: ignore[misc]
    """The policy's tensors under their checkpoint names, gathered one by one in the wire type.

    Args:
        parameters: Gives name and (sharded) tensor, in the same order on every rank.
        shapes: Name and full shape of each, in the same order.
        dtype: Type on the wire.
        device: Where they are sent from.
        buffers: What else a checkpoint holds, by name: sent after them, in its own type.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        *,
        device: torch.device,
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._buffers = buffers or {}
        self._parameters = parameters
        self._shapes = shapes
        self._dtype = dtype
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        """Names, types and full shapes, without a gather."""
        return [
            *(ParamMeta(name, self._dtype, shape) for name, shape in self._shapes),
            *(ParamMeta(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in self._buffers.items()),
        ]

    def size_bytes(self) -> int:
        """Bytes on the wire."""
        size: int = sum(math.prod(shape) for _, shape in self._shapes) * self._dtype.itemsize
        size += sum(buffer.nbytes for buffer in self._buffers.values())
        return size

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters():
            full = full_tensor(parameter.detach(), self._dtype).to(self._device)
            if full.is_cuda:
                # It may have been made in the stream of the tensor before, and must not be freed there under this one.
                full.record_stream(torch.cuda.current_stream())
            yield name, full
        for name, buffer in self._buffers.items():
            yield name, buffer.to(self._device)


class ReplicaClient:
    """vLLM's weight-sync client over the rollout app's Serve handle; used by learner rank 0.

    Args:
        handle: The Serve handle.
        replica_ids: The replicas of the group.
        tensor_parallel_size: Engine workers a replica.
    """

    def __init__(self, handle: Any, replica_ids: list[str], tensor_parallel_size: int) -> None:
        self._handle = handle
        self._offsets = rank_offsets(replica_ids, tensor_parallel_size)
        self.version = 0
        self.failure: Exception | None = None
        """What the last call that failed raised; the replicas are of no use after it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every replica joins under its own rank offset."""
        infos = {name: init_info | {"rank_offset": offset} for name, offset in self._offsets.items()}
        self._all("init_weight_transfer", infos)

    def start_weight_update(self) -> None:
        """Pause the engines and prepare them."""
        self._all("begin_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The engines receive; returns when all have. vLLM calls this during the broadcast."""
        self._all("apply_update", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The engines resume under the new version; vLLM's trainer engine names none, so ours is used."""
        self._all("finish_update", int(weight_version) if weight_version is not None else self.version)

    def missing(self) -> list[str]:
        """Replicas of the group that do not answer any more."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            answers = self._handle.broadcast("status").results(timeout_s=_STATUS_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        # One that has come since takes no part, and pulls the version itself.
        return sorted(self._offsets.keys() - {a.replica_id for a in answers if isinstance(a, LoadReport)})

    def _all(self, method: str, *arguments: Any) -> None:
        try:
            self._ask(method, *arguments)
        except Exception as error:
            self.failure = error
            raise

    def _ask(self, method: str, *arguments: Any) -> None:
        from ray.exceptions import RayActorError

        answers = self._handle.broadcast(method, *arguments).results(timeout_s=_TIMEOUT_S, return_exceptions=True)
        failures = [a for a in answers if isinstance(a, BaseException) and not isinstance(a, RayActorError)]
        if failures:
            raise failures[0]
        if missing := sorted(self._offsets.keys() - {a.replica_id for a in answers if isinstance(a, LoadReport)}):
            raise ReplicaLostError(f"replicas {', '.join(missing)} did not answer {method}")


@contextmanager
def _watching(client: ReplicaClient, purpose: str, *, limit_s: float, tell: Callable[[str], object]) -> Iterator[None]:
    """Within, end this process where the collective that it is in has lost a peer, and so never ends.

    Args:
        client: The replicas; a call of it that failed may have left this process alone in the collective.
        purpose: What is done, for the log.
        limit_s: Longest time for that.
        tell: Told why before the process ends.
    """
    over = threading.Event()

    def watch() -> None:
        ends_at = time.monotonic() + limit_s
        was_stuck = False
        while not over.wait(_WATCH_S):
            reason = _stuck(client, is_late=time.monotonic() > ends_at, limit_s=limit_s)
            # Twice: what failed may be raised here at this moment, and a replica be out of reach for one.
            if reason is None or not was_stuck:
                was_stuck = reason is not None
                continue
            _LOG.error("%s: %s; the learners are started again", purpose, reason)
            try:
                tell(f"{purpose}: {reason}")
            finally:
                os._exit(1)

    watcher = threading.Thread(target=watch, name="nccl-replicas", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _stuck(client: ReplicaClient, *, is_late: bool, limit_s: float) -> str | None:
    """Why a collective with the replicas cannot end; ``None``: it may."""
    if client.failure is not None:
        return f"a replica failed: {client.failure!r}"
    try:
        if missing := client.missing():
            return f"replicas {', '.join(missing)} died"
    except Exception as error:  # Whether they live will be known at the next look, or the time is over.
        _LOG.warning("the replicas could not be asked whether they live: %r", error)
    return f"not done within {limit_s:g} s" if is_late else None


@contextmanager
def _stream_kept() -> Iterator[None]:
    """Leave this thread in its CUDA stream: vLLM's communicator makes one of its own the current one.

    Memory that was cached in the stream before would be of no use to the one after it.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        if stream is not None:
            torch.cuda.set_stream(stream)


class NcclSender:
    """The learner ranks' side of a publication; made on every rank.

    Args:
        app_name: The rollout application.
        deployment_name: Its deployment.
        rank: This learner's rank.
        source: The weights.
        tensor_parallel_size: Engine workers a replica.
        tell: Told why this process ends, where it does: a collective that has lost a peer never returns.
    """

    _client_class = ReplicaClient

    def __init__(
        self,
        *,
        app_name: str,
        deployment_name: str,
        rank: int,
        source: ShardedSource,
        tensor_parallel_size: int,
        tell: Callable[[str], object] = _LOG.error,
    ) -> None:
        self._app_name = app_name
        self._deployment_name = deployment_name
        self._rank = rank
        self._source = source
        self._tensor_parallel_size = tensor_parallel_size
        self._tell = tell
        self._group: tuple[str, ...] = ()
        self._engine: TrainerWeightTransferEngine | None = None

    def send(self, version: int, replica_ids: tuple[str, ...]) -> None:
        """Send the current weights as ``version`` to exactly these replicas; called on every rank, in step."""
        with _stream_kept():
            if self._engine is None or replica_ids != self._group:
                self._connect(replica_ids)
            assert self._engine is not None
            client: ReplicaClient = self._engine.client
            client.version = version
            with self._ended_if_stuck(client, f"sending version {version}", limit_s=_TIMEOUT_S):
                self._engine.send_weights()

    def close(self) -> None:
        """Leave the group, if there is one."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _connect(self, replica_ids: tuple[str, ...]) -> None:
        """Join a new group: at the first publication, and after a replica was replaced."""
        from ray import serve

        self.close()
        handle = serve.get_deployment_handle(self._deployment_name, self._app_name)
        client = self._client_class(handle, list(replica_ids), self._tensor_parallel_size)
        with self._ended_if_stuck(client, "connecting learners and replicas", limit_s=_START_TIMEOUT_S):
            self._engine = self._joined(client, num_workers=len(replica_ids) * self._tensor_parallel_size)
        self._group = replica_ids

    def _joined(self, client: ReplicaClient, *, num_workers: int) -> TrainerWeightTransferEngine:
        """The trainer's engine, when all workers have joined."""
        import ray

        info = NCCLTrainerInitInfo(
            rank=self._rank,
            # Not what the host's name resolves to, which is often a loopback address.
            master_address=ray.util.get_node_ip_address(),
            master_port=_free_port(),
            world_size=1 + num_workers,
            # vLLM's own 1 GiB is held several times over at both ends; the workers are told this one.
            packed_buffer_size_bytes=DEFAULT_BUCKET_BYTES,
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=self._source)

    def _ended_if_stuck(self, client: ReplicaClient, purpose: str, *, limit_s: float) -> AbstractContextManager[None]:
        # The other ranks wait for rank 0 alone, and end with it.
        if self._rank != 0:
            return nullcontext()
        return _watching(client, purpose, limit_s=limit_s, tell=self._tell)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
