from __future__ import annotations

from rlhf_ray.weight_sync.manifest import BucketLayout, WeightManifest


def test_size_is_that_of_all_buckets() -> None:
    buckets = tuple(BucketLayout(size_bytes=size, tensors=()) for size in (100, 28))

    assert WeightManifest(version=1, publication="p", buckets=buckets).size_bytes == 128
    assert WeightManifest(version=1, publication="p", buckets=()).size_bytes == 0
