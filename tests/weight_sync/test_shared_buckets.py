from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.weight_sync import shared_buckets
from rlhf_ray.weight_sync.buckets import ByteArray, gather_buckets
from rlhf_ray.weight_sync.manifest import BucketLayout
from rlhf_ray.weight_sync.shared_buckets import SharedBuckets


def one_bucket(values: torch.Tensor) -> tuple[list[BucketLayout], list[list[ByteArray]]]:
    ((layout, pieces),) = gather_buckets([("w", values)], dtype=torch.float32, keep=True)
    assert pieces is not None
    return [layout], [pieces]


def read_in_a_process_of_its_own(path: str) -> bytes:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(Path.read_bytes, (Path(path),))


def test_a_child_process_reads_what_was_written() -> None:
    (update,) = SharedBuckets().write(*one_bucket(torch.arange(4.0)))

    assert np.frombuffer(read_in_a_process_of_its_own(update["path"]), np.float32).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert update["tensors"] == [("w", [4], "float32", 0, 16)]
    assert update["size_bytes"] == 16


def test_the_next_publication_is_written_over_the_last_one() -> None:
    shared = SharedBuckets()
    (first,) = shared.write(*one_bucket(torch.zeros(4)))
    shared.release()
    (second,) = shared.write(*one_bucket(torch.ones(4)))

    assert first == second
    assert np.fromfile(second["path"], np.float32).tolist() == [1.0] * 4


def test_a_publication_of_fewer_buckets_follows_one_of_more() -> None:
    shared = SharedBuckets()
    layouts, buckets = one_bucket(torch.zeros(4))
    assert len({update["path"] for update in shared.write(layouts * 3, buckets * 3)}) == 3

    assert len(shared.write(layouts, buckets)) == 1


def test_large_memory_is_given_back_between_publications(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedBuckets()
    (update,) = shared.write(*one_bucket(torch.zeros(4)))
    shared.release()
    assert os.stat(update["path"]).st_size == 16

    monkeypatch.setattr(shared_buckets, "_KEPT_BYTES", 15)
    shared.write(*one_bucket(torch.zeros(4)))
    shared.release()
    assert os.stat(update["path"]).st_size == 0
    (update,) = shared.write(*one_bucket(torch.ones(4)))
    assert np.fromfile(update["path"], np.float32).tolist() == [1.0] * 4


def test_a_write_that_the_system_cuts_short_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, data[:5], offset))

    (update,) = SharedBuckets().write(*one_bucket(torch.arange(4.0)))

    assert np.fromfile(update["path"], np.float32).tolist() == [0.0, 1.0, 2.0, 3.0]
