"""Engine side of a publication: vLLM weight-transfer engines that map buckets from shared memory.

vLLM's own backends need GPUs. On CPUs an engine is told which memory the replica has written (shared_buckets.py) and
how, maps it and loads the views through vLLM's layer-wise reload. On GPUs weights come over NCCL, or from a learner on
the same GPU, to all replicas at once; one that starts later gets its first ones through shared memory too, since nobody
else needs them.

All are registered when vLLM imports this module, which ``worker_extension_cls`` makes it do inside the engine's own
process.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
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
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rlhf_ray.weight_sync.buckets import unpack_bucket
from rlhf_ray.weight_sync.engine_process import end_with_parent
from rlhf_ray.weight_sync.manifest import BucketLayout, TensorLayout, under_each_name

__all__ = ["IpcTransferEngine", "NcclTransferEngine", "SharedMemoryExtension", "SharedMemoryTransferEngine"]


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: the file that holds it and, per tensor, ``(name, shape, dtype, offset_bytes, size_bytes)``."""

    path: str
    size_bytes: int
    tensors: list[tuple[str, list[int], str, int, int]]


class _Buckets:
    """Buckets that are mapped during an update."""

    def __init__(self) -> None:
        # A fused module may be split over two buckets; its views must stay readable until the update is finished.
        self._mapped: list[np.memmap[Any, np.dtype[np.uint8]]] = []

    def load(self, info: SharedMemoryUpdateInfo, model: Any, device: torch.device) -> None:
        """Map one bucket and load its tensors."""
        data = np.memmap(info.path, dtype=np.uint8, mode="c", shape=(info.size_bytes,))
        self._mapped.append(data)
        layout = BucketLayout(
            size_bytes=info.size_bytes,
            tensors=tuple(
                TensorLayout(name=name, shape=tuple(shape), dtype=dtype, offset_bytes=offset, size_bytes=size)
                for name, shape, dtype, offset, size in info.tensors
            ),
        )
        model.load_weights([(name, tensor.to(device)) for name, tensor in unpack_bucket(layout, data)])
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def clear(self) -> None:
        """Unmap them."""
        self._mapped.clear()


def _load_tied_weights(model: Any) -> None:
    """Let a model load a weight that is tied, and so sent once, under each of its names.

    An output layer that vLLM ties to the embedding is filled here. Kernels of CPUs keep a packed copy of it, so that it
    must be loaded like any other; but not all models find the layer by its name (Bloom). One that has none (Gemma 2)
    would refuse the name.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    output = next((layer for name, layer in layers.items() if name.rpartition(".")[2] == "lm_head"), None)
    weight = getattr(output, "weight", None)
    is_tied = any(layer is not output and getattr(layer, "weight", None) is weight for layer in layers.values())
    load_weights = model.load_weights

    def passed_on(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in under_each_name(weights):
            if not name.endswith("lm_head.weight") or (output is not None and not is_tied):
                yield name, tensor
            elif output is not None:
                output.weight.weight_loader(output.weight, tensor)

    model.load_weights = lambda weights: load_weights(passed_on(weights))


class _Constants:
    """Buffers of layers that also have weights.

    vLLM 0.32 reloads a layer as a whole: a buffer that no checkpoint holds (a scale that follows from a size) is left
    uninitialized, without an error. None is trained, so they are put back as they were; but those of quantized layers,
    which may follow from weights.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._kept: list[tuple[torch.nn.Module, str, torch.Tensor]] = [
            (layer, name, buffer.clone())
            for layer in model.modules()
            if any(parameter is not None for parameter in layer._parameters.values()) and not _is_quantized(layer)
            for name, buffer in layer.named_buffers(recurse=False)
        ]

    def put_back(self) -> None:
        """After a reload."""
        for layer, name, buffer in self._kept:
            getattr(layer, name).copy_(buffer)


def _is_quantized(layer: torch.nn.Module) -> bool:
    method = getattr(layer, "quant_method", None)
    return method is not None and not type(method).__name__.startswith("Unquantized")


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Let vLLM rebuild the kernels of experts with the incoming weights.

    On CPUs a kernel packs its weights when it is made. vLLM 0.32 keeps a kernel over a reload, and so copies weights
    that are not packed to where it looks for packed ones: the layer computes nonsense without an error.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class SharedMemoryTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):  # type: ignore[misc]
    """Loads buckets that another process of this machine wrote to shared memory."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _load_tied_weights(self.model)
        self._buckets = _Buckets()

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Do nothing: files need no handshake."""

    def start_weight_update(self) -> None:
        """Begin vLLM's layer-wise reload."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        self._constants = _Constants(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load one bucket."""
        self._buckets.load(update_info, self.model, self.device)

    def finish_weight_update(self) -> None:
        """End the layer-wise reload and unmap the buckets."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._constants.put_back()
        self._buckets.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the base class's device synchronization has no meaning without an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def shutdown(self) -> None:
        """Unmap what an interrupted update left."""
        self._buckets.clear()


class _BucketsToo(WeightTransferEngine[Any, Any]):  # type: ignore[misc]
    """Makes an engine of vLLM's also load a bucket from shared memory where an update describes one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _load_tied_weights(self.model)
        self._buckets = _Buckets()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive what the learners send, or load one bucket."""
        if "path" in update_info:
            self._buckets.load(SharedMemoryUpdateInfo(**update_info), self.model, self.device)
        else:
            super().update_weights(update_info)

    def start_weight_update(self) -> None:
        """Begin vLLM's layer-wise reload."""
        self._constants = _Constants(self.model)
        super().start_weight_update()

    def finish_weight_update(self) -> None:
        """End the layer-wise reload and unmap the buckets."""
        super().finish_weight_update()
        self._constants.put_back()
        self._buckets.clear()

    def shutdown(self) -> None:
        """Let go of what the learners sent, and of their group."""
        super().shutdown()
        self._buckets.clear()


class NcclTransferEngine(_BucketsToo, NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL engine, which also loads buckets."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the learners' group; another one is left, whose GPU memory nothing else would free."""
        NCCLWeightTransferEngine.shutdown(self)
        super().init_transfer_engine(init_info)


class IpcTransferEngine(_BucketsToo, IPCWeightTransferEngine):  # type: ignore[misc]
    """vLLM's ipc engine, which also loads buckets."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Take back what opens the learners' buffers (ipc.py)."""
        handles: bytes = update_dict["ipc_handles"]
        return super().parse_update_info(update_dict | {"ipc_handles": pickle.loads(handles)})


class SharedMemoryExtension:
    """Named in ``worker_extension_cls`` so that vLLM imports, and so registers, this module in its own process."""


end_with_parent()

for _name, _engine in (
    ("rlhf_ray_shared_memory", SharedMemoryTransferEngine),
    ("rlhf_ray_nccl", NcclTransferEngine),
    ("rlhf_ray_ipc", IpcTransferEngine),
):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _engine)
