"""Engine side of a publication on CPUs: a vLLM weight-transfer engine that maps buckets from shared memory.

vLLM's own backends need GPUs. This one is told which memory the replica has written (shared_buckets.py) and how, maps
it and loads the views through vLLM's layer-wise reload. It is registered when vLLM imports this module, which
``worker_extension_cls`` makes it do inside the engine's own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rlhf_ray.weight_sync.buckets import unpack_bucket
from rlhf_ray.weight_sync.manifest import BucketLayout, TensorLayout

__all__ = ["BACKEND", "SharedMemoryExtension", "SharedMemoryTransferEngine"]

BACKEND = "rlhf_ray_shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: the file that holds it and, per tensor, ``(name, shape, dtype, offset_bytes, size_bytes)``."""

    path: str
    size_bytes: int
    tensors: list[tuple[str, list[int], str, int, int]]


class SharedMemoryTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):  # type: ignore[misc]
    """Loads buckets that another process of this machine wrote to shared memory."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A fused module may be split over two buckets; its views must stay readable until the update is finished.
        self._mapped: list[np.memmap[Any, np.dtype[np.uint8]]] = []

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Do nothing: files need no handshake."""

    def start_weight_update(self) -> None:
        """Begin vLLM's layer-wise reload."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Map one bucket and load its tensors."""
        data = np.memmap(update_info.path, dtype=np.uint8, mode="c", shape=(update_info.size_bytes,))
        self._mapped.append(data)
        layout = BucketLayout(
            size_bytes=update_info.size_bytes,
            tensors=tuple(
                TensorLayout(name=name, shape=tuple(shape), dtype=dtype, offset_bytes=offset, size_bytes=size)
                for name, shape, dtype, offset, size in update_info.tensors
            ),
        )
        self.model.load_weights([(name, tensor.to(self.device)) for name, tensor in unpack_bucket(layout, data)])

    def finish_weight_update(self) -> None:
        """End the layer-wise reload and unmap the buckets."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._mapped.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the base class's device synchronisation has no meaning without an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Unmap what an interrupted update left."""
        self._mapped.clear()


class SharedMemoryExtension:
    """Named in ``worker_extension_cls`` so that vLLM imports, and so registers, this module in its own process."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransferEngine)
