from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf_ray.weight_sync.buckets import ByteArray, full_tensor, gather_buckets, unpack_bucket
from rlhf_ray.weight_sync.manifest import BucketLayout
from rlhf_ray.weight_sync.shared_buckets import SharedBuckets

Named = list[tuple[str, torch.Tensor]]


def packed(
    parameters: Named, *, dtype: torch.dtype = torch.float32, bucket_bytes: int = 1 << 20
) -> list[tuple[BucketLayout, list[ByteArray]]]:
    buckets = []
    for layout, pieces in gather_buckets(parameters, dtype=dtype, keep=True, bucket_bytes=bucket_bytes):
        assert pieces is not None
        buckets.append((layout, pieces))
    return buckets


def unpacked(buckets: Iterable[tuple[BucketLayout, list[ByteArray]]]) -> Named:
    """What an engine finds in the memory that a replica wrote."""
    shared = SharedBuckets()
    buckets = list(buckets)
    updates = shared.write([layout for layout, _ in buckets], [pieces for _, pieces in buckets])
    maps = [np.fromfile(update["path"], dtype=np.uint8) for update in updates]
    return [
        entry
        for (layout, _), data in zip(buckets, maps, strict=True)
        for entry in unpack_bucket(layout, data[: layout.size_bytes])
    ]


def random_parameters() -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (7, 3), "norm": (5,), "scale": (), "up": (4, 2, 3), "last": (1,)}
    return [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_round_trip(dtype: torch.dtype, bucket_bytes: int) -> None:
    parameters = random_parameters()

    found = unpacked(packed(parameters, dtype=dtype, bucket_bytes=bucket_bytes))

    assert [name for name, _ in found] == [name for name, _ in parameters]
    for (_, tensor), (_, parameter) in zip(found, parameters, strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == parameter.shape
        assert torch.equal(tensor, parameter.to(dtype))


def test_integers_keep_their_type() -> None:
    parameters = [("table", torch.arange(5)), ("flags", torch.tensor([True, False]))]

    found = unpacked(packed(parameters, dtype=torch.bfloat16))

    assert [tensor.dtype for _, tensor in found] == [torch.int64, torch.bool]
    assert found[0][1].tolist() == [0, 1, 2, 3, 4]
    assert found[1][1].tolist() == [True, False]


def test_a_parameter_that_is_not_contiguous_is_laid_out_row_by_row() -> None:
    transposed = torch.arange(6.0).view(2, 3).t()

    ((_, found),) = unpacked(packed([("w", transposed)]))

    assert found.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_parameters_that_need_a_gradient_are_taken_too() -> None:
    ((_, found),) = unpacked(packed([("w", torch.ones(2, requires_grad=True))]))

    assert found.tolist() == [1.0, 1.0]


def test_tensors_start_at_multiples_of_64_bytes() -> None:
    ((layout, pieces),) = packed([("a", torch.ones(3)), ("b", torch.ones(17)), ("c", torch.ones(1))])

    assert [(t.offset_bytes, t.size_bytes) for t in layout.tensors] == [(0, 12), (64, 68), (192, 4)]
    assert [len(piece) for piece in pieces] == [12, 68, 4]
    assert layout.size_bytes == 196


def test_a_bucket_is_cut_before_it_exceeds_its_limit() -> None:
    # 16 floats are 64 bytes: no padding between them.
    parameters = [(str(number), torch.full((16,), float(number))) for number in range(5)]

    buckets = packed(parameters, bucket_bytes=130)

    assert [[t.name for t in layout.tensors] for layout, _ in buckets] == [["0", "1"], ["2", "3"], ["4"]]
    assert [tensor.offset_bytes for tensor in buckets[1][0].tensors] == [0, 64]


@pytest.mark.parametrize("bucket_bytes", [64, 100, 128, 200, 1000])
def test_no_bucket_exceeds_its_limit(bucket_bytes: int) -> None:
    parameters = [(str(size), torch.ones(size)) for size in (1, 5, 16, 3, 15, 2, 1, 9)]

    buckets = packed(parameters, bucket_bytes=bucket_bytes)

    assert max(layout.size_bytes for layout, _ in buckets) <= bucket_bytes
    assert all(layout.size_bytes >= sum(len(piece) for piece in pieces) for layout, pieces in buckets)


def test_a_tensor_larger_than_the_limit_has_a_bucket_of_its_own() -> None:
    parameters = [("small", torch.ones(2)), ("large", torch.ones(100)), ("after", torch.ones(2))]

    buckets = packed(parameters, bucket_bytes=64)

    assert [[t.name for t in layout.tensors] for layout, _ in buckets] == [["small"], ["large"], ["after"]]
    assert buckets[1][0].size_bytes == 400


def test_ranks_that_keep_nothing_see_the_same_layouts() -> None:
    parameters = random_parameters()

    mine = packed(parameters, bucket_bytes=100)
    others = list(gather_buckets(parameters, dtype=torch.float32, keep=False, bucket_bytes=100))

    assert [layout for layout, _ in others] == [layout for layout, _ in mine]
    assert all(pieces is None for _, pieces in others)


def test_unpacked_tensors_are_views() -> None:
    ((layout, (piece,)),) = packed([("a", torch.ones(2))])
    data = piece.copy()
    ((_, tensor),) = unpack_bucket(layout, data)

    data[:] = 0

    assert tensor.tolist() == [0.0, 0.0]


def test_an_offloaded_tensor_is_gathered_where_its_mesh_communicates(tmp_path: Path) -> None:
    # A GPU learner may keep its shards in CPU memory; the network of its mesh is that of the GPUs.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        offloaded = distribute_tensor(torch.ones(5, 3), DeviceMesh("cpu", [0]), [Shard(0)])
        offloaded.device_mesh._device_type = "meta"

        assert offloaded.to_local().device.type == "cpu"
        assert full_tensor(offloaded).device.type == "meta"
    finally:
        dist.destroy_process_group()


def test_no_parameters_make_no_bucket() -> None:
    assert packed([]) == []
