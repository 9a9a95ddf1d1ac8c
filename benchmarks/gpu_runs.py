"""Parts (c) and (d) of gpu.py: what takes several processes, from runs on one shared GPU to tensor parallelism."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu import Bench
from gpu_engine import MEAN_WITHIN
from gpu_learner import SMALL, Weights, apart, farthest, learner, model, scores, small_batch, trained
from rank import rank_of

from rlhf_ray import PPOConfig
from rlhf_ray.learner.batch import SequenceBatch

# Adam's steps are to change the policy by more than rounding does, or an engine with old weights would pass.
_LR = 1e-3
_LEAST_KL = 0.05


def shared_gpu_checks(bench: Bench) -> None:
    """Make all checks of one GPU that replica and learner share."""
    bench.run("runs in turns", turns)


def two_gpu_checks(bench: Bench) -> None:
    """Make all checks for which each process has a GPU of its own."""
    bench.run("two pairs share two GPUs", two_pairs, num_gpus=2 * bench.on_gpu)
    bench.run("publication over NCCL", over_nccl, num_gpus=2)
    bench.run("publication through shared memory", through_shared_memory, num_gpus=2)
    bench.run("an engine is killed", killed_engine, num_gpus=2 * bench.on_gpu)
    bench.run("tensor parallel 2", tensor_parallel, num_gpus=2)
    bench.run("sequence parallel 2", sequence_parallel, num_gpus=2 * bench.on_gpu)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What some iterations left."""

    results: list[dict[str, Any]]
    weights: Weights
    """Of the exported policy."""
    places: tuple[list[tuple[str, str]], list[tuple[str, str]]]
    """Node and GPU of each replica and of each learner, sorted; empty where they do not take turns."""


def trained_run(bench: Bench, name: str, config: PPOConfig, *, iterations: int = 3, kill_engine: bool = False) -> Run:
    """Train the quickstart's model, export it, and expect what holds of each run.

    Args:
        bench: Where to note that.
        name: Of the run.
        config: Settings that differ from the quickstart's.
        iterations: How many.
        kill_engine: Whether an engine's process dies in the second of them.
    """
    import ray
    from safetensors.torch import load_file

    config = (
        config.training(iterations=iterations, lr=_LR, kl_coef=0.01)
        .resources(device="cuda" if bench.on_gpu else "cpu")
        .reporting(run_dir=str(bench.scratch / name))
    )
    algorithm = config.build_algo()
    try:
        results = []
        for number in range(iterations):
            if kill_engine and number == 1:
                threading.Timer(0.05, engine_process().kill).start()
            results.append(algorithm.train())
        replicas, ranks = ray.get(algorithm._running().learners.bridge.places.remote())
        folder = algorithm.export_hf(bench.scratch / f"{name}-exported")
    finally:
        algorithm.stop()
    differences = [each["learner"]["sampling_logprob_diff_mean"] for each in results]
    bench.at_most(
        f"{name}: mean distance of an engine's log-probabilities from learners'", max(differences), MEAN_WITHIN
    )
    changes = [each["learner"]["approx_kl"] for each in results[:-1]]
    bench.at_least(f"{name}: change of the policy by an update before the last, KL", max(changes), _LEAST_KL)
    versions = [each["learner"]["policy_version"] for each in results]
    bench.expect(f"{name}: policy versions", versions, list(range(1, iterations + 1)))
    return Run(
        results=results,
        weights=load_file(folder / "model.safetensors"),
        places=(sorted(replicas.values()), sorted(ranks.values())),
    )


def engine_process() -> psutil.Process:
    """One of this process's engines."""
    return next(p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline()))


def summary(run: Run) -> dict[str, Any]:
    """What a run measured, by iteration."""
    return {
        "sampling_logprob_diff_max": [each["learner"]["sampling_logprob_diff_max"] for each in run.results],
        "approx_kl": [each["learner"]["approx_kl"] for each in run.results],
        "timers": [each["timers"] for each in run.results],
        "places": run.places,
    }


def turns(bench: Bench) -> dict[str, Any]:
    """PPO with critic and reference in turns; the weights that it learns are those of another way to publish.

    On a GPU that is the ipc engine; numbers depend on the batches that sequences happen to be in, so two runs are near
    each other. On a CPU it is a run without turns, and no bit may differ.
    """
    ours = trained_run(bench, "turns", PPOConfig().resources(colocate=True))
    bench.expect("GPUs of replicas and of learners", *ours.places)
    if bench.on_gpu:
        name, config = "ipc", PPOConfig().resources(colocate=True).rollouts(weight_transfer="ipc")
    else:
        name, config = "separate", PPOConfig().resources(colocate=False)
    theirs = trained_run(bench, name, config)
    first = _first_weights()
    distance = apart(ours.weights, theirs.weights, {key: first[key] for key in ours.weights})
    bench.at_most(f"weights apart from those of {name}", distance, 0.5 if bench.on_gpu else 0.0)
    return {"turns": summary(ours), name: summary(theirs), "weights_apart": distance}


def _first_weights() -> Weights:
    from safetensors.torch import load_file

    from rlhf_ray.quickstart import model_path

    return {name: weight.float() for name, weight in load_file(Path(model_path()) / "model.safetensors").items()}


def two_pairs(bench: Bench) -> dict[str, Any]:
    """Two replicas and two learners: each GPU has one of each."""
    config = PPOConfig().resources(colocate=True).rollouts(num_replicas=2).learners(num_learners=2)
    run = trained_run(bench, "pairs", config.rollouts(weight_transfer="ipc") if bench.on_gpu else config)
    replicas, ranks = run.places
    bench.expect("GPUs of replicas and of learners", replicas, ranks)
    bench.expect("GPUs that have a pair", len(set(ranks)), 2 if bench.on_gpu else 1)
    return summary(run)


def over_nccl(bench: Bench) -> dict[str, Any]:
    """A GPU each, weights sent over NCCL."""
    config = PPOConfig().resources(colocate=False).rollouts(weight_transfer="nccl")
    return summary(trained_run(bench, "nccl", config))


def through_shared_memory(bench: Bench) -> dict[str, Any]:
    """A GPU each, weights through the object store."""
    config = PPOConfig().resources(colocate=False).rollouts(weight_transfer="shared_memory")
    return summary(trained_run(bench, "shared_memory", config))


def killed_engine(bench: Bench) -> dict[str, Any]:
    """An engine's process is killed: a new replica pulls its weights, and the next publication reaches it."""
    run = trained_run(bench, "killed", PPOConfig().resources(colocate=False), iterations=5, kill_engine=True)
    restarts = run.results[-1]["fault_tolerance"]["replica_restarts"]
    bench.expect("replicas that were started again", restarts, 1)
    return summary(run)


def tensor_parallel(bench: Bench) -> dict[str, Any]:
    """An engine on two GPUs, a learner on CPUs."""
    config = PPOConfig().resources(colocate=False).rollouts(tensor_parallel_size=2)
    return summary(trained_run(bench, "tensor_parallel", config.learners(num_gpus_per_learner=0)))


def sequence_parallel(bench: Bench) -> dict[str, Any]:
    """Two ranks that read slices of each sequence compute what one does, padded and packed."""
    path, batch, measured = model(bench, SMALL), small_batch(), {}
    for kernel, dtype, score_within, update_within in (
        ("sdpa", "float32", 1e-5, 1e-3),
        ("varlen", "float32", 1e-5, 1e-3),
        *((("varlen", "bfloat16", 0.2, 0.1),) if bench.on_gpu else ()),
    ):
        name = f"{kernel}, {dtype}"
        one, two = (_ranks(bench, size, path, batch, kernel, dtype) for size in (1, 2))
        bench.at_most(f"{name}: log-probabilities apart", farthest(two["scores"], one["scores"]), score_within)
        bench.at_most(f"{name}: update apart", apart(two["after"], one["after"], one["before"]), update_within)
        bench.expect(f"{name}: weights that did not move", two["still"], [])
        bench.expect(f"{name}: rows are packed", two["packed"], kernel == "varlen")
        measured[name] = {"seconds": [one["seconds"], two["seconds"]]}
    return measured


def _ranks(bench: Bench, size: int, path: str, batch: SequenceBatch, kernel: str, dtype: str) -> dict[str, Any]:
    """What the first of ``size`` ranks found that read the same sequences."""
    folder = bench.scratch / f"{size}-{kernel}-{dtype}"
    folder.mkdir()
    torch.multiprocessing.spawn(_rank, (size, folder, bench.on_gpu, path, batch, kernel, dtype), nprocs=size)
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def _rank(
    number: int, size: int, folder: Path, on_gpu: bool, path: str, batch: SequenceBatch, kernel: str, dtype: str
) -> None:
    with rank_of(size, number, on_gpu=on_gpu, store=folder / "store"):
        rank = learner(path, on_gpu=on_gpu, dtype=dtype, kernel=kernel, sequence_parallel=size)
        logprobs = scores(rank, batch)
        started = time.perf_counter()
        before, after, _, still = trained(rank, batch)
        if number == 0:
            found = {"scores": logprobs, "before": before, "after": after, "still": still, "packed": rank.packed}
            torch.save(found | {"seconds": time.perf_counter() - started}, folder / "found.pt")
