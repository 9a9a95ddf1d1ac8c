"""Publication on shared GPUs: vLLM's ipc engine, each learner rank to the engine worker on its own GPU.

NCCL refuses two ranks on one GPU. Every rank gathers the weights piece by piece into a buffer on its GPU and hands out
what opens it; rank 0 collects that of all ranks, by the GPU's UUID, and every worker finds its own GPU's.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

from rlhf_ray.weight_sync.buckets import DEFAULT_BUCKET_BYTES
from rlhf_ray.weight_sync.nccl import NcclSender, ReplicaClient

__all__ = ["IpcClient", "IpcSender"]


class IpcClient(ReplicaClient):
    """The replicas where weights stay on their GPU."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every replica joins alike: there are no ranks to claim."""
        self._all("init_weight_transfer", dict.fromkeys(self._offsets, init_info))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The engines copy one buffer; returns when all have.

        What opens it is pickled: vLLM sends its engine's process plain types alone.
        """
        super().update_weights(update_info | {"ipc_handles": pickle.dumps(update_info["ipc_handles"])})


class IpcSender(NcclSender):
    """The learner ranks' side of a publication; made on every rank."""

    _client_class = IpcClient

    def send(self, version: int, replica_ids: tuple[str, ...]) -> None:
        """As :meth:`NcclSender.send`; the engine on this GPU can then have the memory that it took."""
        super().send(version, replica_ids)
        torch.cuda.empty_cache()

    def _joined(self, client: ReplicaClient, *, num_workers: int) -> IPCTrainerWeightTransferEngine:
        # A buffer holds whole tensors, and there is one of them.
        largest = max((math.prod(one.shape) * one.dtype.itemsize for one in self._source.metadata()), default=0)
        info = IPCTrainerInitInfo(
            rank=self._rank, packed=True, packed_buffer_size_bytes=max(DEFAULT_BUCKET_BYTES, largest)
        )
        return IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=self._source)
