"""One rank that builds learners, for comparison with whole models, and of how much memory that takes.

``python loading_ranks.py FOLDER RANK WORLD_SIZE`` builds one of each case of ``FOLDER/cases.json`` and leaves
``FOLDER/rank<RANK>.json``: by case what differs from models that this process reads by itself or, where the case asks
for that, by how many bytes its memory grew at most.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import learner_scenarios as runs
import torch
import torch.distributed as dist
from learner_scenarios import Scenario

from rlhf_ray.learner.checkpoint_format import CheckpointFormat
from rlhf_ray.learner.initial_weights import InitialWeights, reads_weights
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.lora import LoraSpec, add_adapters, tied_names
from rlhf_ray.learner.models import freeze, load_critic, load_policy, shard

LOADING: dict[str, Any] = {"kernels": ("sdpa", "eager"), "trust_remote_code": False}
LORA = LoraSpec(rank=4, alpha=8.0, targets=(), seed=5)


def learner_of(folder: Path, case: dict[str, Any]) -> Learner:
    """A learner of the case's models, its spec changed by ``case["spec"]``."""
    spec = case.get("spec", {}) | ({"lora": LORA} if case.get("lora") else {})
    training = {"kl_coef": 0.1} if case.get("critic") else {"advantage": "grpo"}
    scenario = Scenario(critic=case.get("critic", ""), training=training, spec=spec)
    return Learner(runs.make_spec(folder / case["folder"], scenario))


def differences(learner: Learner, folder: Path, case: dict[str, Any]) -> list[str]:
    """What is not as in models that are read here and stay whole."""
    dtype = getattr(torch, case.get("spec", {}).get("dtype", "float32"))
    policy, reference = (load_policy(str(folder / "policy"), **LOADING) for _ in range(2))
    if case.get("lora"):
        add_adapters(policy, LORA)
    freeze(reference, dtype)
    pairs = {"policy": (learner.policy.model, policy)}
    if learner.critic is not None:
        pairs["critic"] = learner.critic.model, load_critic(str(folder / case["critic"]), **LOADING)
    if not case.get("lora") and learner._models.reference is not None:
        pairs["reference"] = learner._models.reference.model, reference
    return [f"{name}: {found}" for name, pair in pairs.items() for found in _compared(*pair)]


def transposed_differences() -> list[str]:
    """What is not as on the reader in a buffer whose memory is in another order than its numbers."""
    wanted = torch.arange(12.0).view(3, 4).T
    model = torch.nn.Module()
    model.register_buffer("mask", wanted.clone() if reads_weights() else torch.zeros(3, 4).T)
    assert not model.mask.is_contiguous()
    InitialWeights(model).fill(model, "cpu")
    return [] if torch.equal(model.mask, wanted) else [str(model.mask)]


def _compared(sharded: Any, whole: Any) -> Iterator[str]:
    mine, wanted = dict(sharded.named_parameters()), dict(whole.named_parameters())
    if mine.keys() != wanted.keys() or sorted(tied_names(sharded)) != sorted(tied_names(whole)):
        yield f"has {sorted(mine.keys() ^ wanted.keys())}, tied {tied_names(sharded)}"
    for name in sorted(mine.keys() & wanted.keys()):  # In step: a gather is a collective.
        if mine[name].requires_grad != wanted[name].requires_grad or not _equal(mine[name].full_tensor(), wanted[name]):
            yield name
    buffers = dict(sharded.named_buffers())
    yield from (name for name, buffer in whole.named_buffers() if not _equal(buffers.pop(name), buffer))
    yield from buffers
    if sharded.training != whole.training or sharded.config.to_dict() != whole.config.to_dict():
        yield "configuration"
    checkpoints = [CheckpointFormat(model).shapes for model in (sharded, whole)]
    if checkpoints[0] != checkpoints[1]:
        yield "names in a checkpoint"


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def own_bytes() -> int:
    """Memory of this process, without files that it has mapped, which the machine can take back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def highest() -> Iterator[list[int]]:
    """In the list, the memory before and, afterwards, at its highest meanwhile."""
    found, ended = [own_bytes(), own_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            found[1] = max(found[1], own_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


class Sharded(Exception):
    """The first model is: what a learner does then is not measured."""


def growth_until_sharded(folder: Path, case: dict[str, Any]) -> int:
    def shard_alone(*arguments: Any, **keywords: Any) -> None:
        shard(*arguments, **keywords)
        raise Sharded

    with highest() as memory, patch("rlhf_ray.learner.build.shard", shard_alone), suppress(Sharded):
        learner_of(folder, case)
    return memory[1] - memory[0]


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        if case.get("measured"):
            results[name] = growth_until_sharded(folder, case)
        elif case.get("transposed"):
            results[name] = transposed_differences()
        else:
            results[name] = differences(learner_of(folder, case), folder / case["folder"], case)
        gc.collect()
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
