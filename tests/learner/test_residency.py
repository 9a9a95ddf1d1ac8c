"""Storages that are freed and come back under the tensors they belong to; whole learners are in test_learner.py."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.learner import residency as module
from rlhf_ray.learner.residency import Residency

CPU = torch.device("cpu")


def test_tensors_that_share_memory_still_do_when_it_is_back() -> None:
    padded = torch.randn(6, 4)
    view, empty, bits = padded[:5], torch.empty(0), torch.randn(3).to(torch.bfloat16)
    wanted = padded.clone(), bits.clone()
    residency = Residency(CPU)
    for _ in range(3):
        residency.offload([view, padded, empty, bits, bits])
        assert [tensor.untyped_storage().nbytes() for tensor in (padded, view, bits)] == [0, 0, 0]
        residency.onload()
        assert torch.equal(padded, wanted[0])
        assert torch.equal(bits, wanted[1])
    view[0] = 1.0
    assert padded[0].tolist() == [1.0] * 4


def test_host_memory_is_taken_once_and_is_that_of_all_tensors_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself each would take the next power of two, where it is pinned."""
    monkeypatch.setattr(module, "_SLAB_BYTES", 16)
    tensors = [torch.randn(9), torch.randn(17).bfloat16(), torch.randn(()), torch.randn(5)]
    wanted = [tensor.clone() for tensor in tensors]
    residency, taken = Residency(CPU), []
    for _ in range(2):
        residency.offload(tensors)
        taken.append([(slab.data_ptr(), slab.nbytes) for slab in residency._slabs])
        residency.onload()
        assert all(map(torch.equal, tensors, wanted))
    assert taken[0] == taken[1]
    assert [size for _, size in taken[0]] == [16] * 6  # Of 94 bytes.


def test_what_is_away_is_read_from_host_memory_until_it_leaves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_BYTES", 16)
    whole = torch.arange(12.0).view(3, 4)
    named = {"part": whole[1:], "spread": whole[:, 1:3].T, "half": torch.arange(7).bfloat16(), "count": torch.ones(())}
    there = torch.arange(3.0)  # Not among those that leave.
    wanted = {name: tensor.clone().contiguous() for name, tensor in named.items()}
    residency = Residency(CPU)

    def read(tensor: torch.Tensor) -> torch.Tensor:
        pieces = torch.cat(list(residency.bytes_of(tensor)))
        return pieces.view(tensor.dtype).view(tensor.shape)

    residency.offload([torch.ones(5), whole, *named.values()])
    assert all(torch.equal(read(tensor), wanted[name]) for name, tensor in named.items())
    residency.onload()
    for tensor in named.values():
        tensor.add_(1)
    assert all(torch.equal(read(tensor), wanted[name]) for name, tensor in named.items())
    assert torch.equal(read(there), torch.arange(3.0))
    changed = whole.clone()
    residency.offload([whole])
    assert torch.equal(read(whole), changed)
    assert torch.equal(read(named["half"]), wanted["half"] + 1)


@pytest.mark.parametrize("patience_s", [10.0, 0.0])
def test_memory_that_a_dying_process_has_not_given_back_is_waited_for(
    patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Storage:
        tries = 0

        def resize_(self, size_bytes: int) -> None:
            self.tries += 1
            if self.tries < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    storage = Storage()
    if patience_s:
        module._allocate(storage, 8, module.time.monotonic() + patience_s)  # type: ignore[arg-type]
        assert storage.tries == 3
    else:
        with pytest.raises(torch.OutOfMemoryError):
            module._allocate(storage, 8, module.time.monotonic() - 1.0)  # type: ignore[arg-type]
