"""Part (a) of gpu.py: one learner rank without Ray and vLLM. Numbers first, then speed and memory."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import Bench
from rank import learner_spec, one_rank

from rlhf_ray import PPOConfig
from rlhf_ray.advantages import gae
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.learner import Learner
from rlhf_ray.learner.packing import attention_length, plan_update
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.losses import chunked_logprobs_and_entropy
from rlhf_ray.types import Device
from rlhf_ray.weight_sync.buckets import full_tensor

SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    # Logits that are neither all alike nor all but one of no weight: log-probabilities then tell weights apart.
    "initializer_range": 0.05,
}
# Qwen2.5-1.5B.
LARGE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
CPU_KERNELS = ("sdpa", "varlen")
KERNELS = (*CPU_KERNELS, "flex_attention", "flash_attention_2", "flash_attention_3")

Weights = dict[str, torch.Tensor]


def learner_checks(bench: Bench) -> None:
    """Make all checks of the learner."""
    with one_rank(on_gpu=bench.on_gpu):
        bench.run("float32 and bfloat16 against the CPU", precision)
        bench.run("attention kernels, packed and padded", attention_kernels)
        bench.run("head: chunk sizes", head_chunks)
        bench.run("head: answers in bfloat16", head_answers)
        bench.run("GAE of long rows", long_rows)
        bench.run("synchronizations of an update", synchronizations, num_gpus=1)
        bench.run("state comes back", state)
        bench.run("checkpoint", checkpoint)
        bench.run("PPO update, 1.5B", updates)
        bench.run("publication", publication)


def model(bench: Bench, shape: dict[str, Any], *, tied: bool = False) -> str:
    """A Qwen2 of this shape with random weights, which serves as policy and critic."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = bench.scratch / f"{shape['hidden_size']}-{tied}"
    if not folder.is_dir():
        torch.manual_seed(0)
        config = Qwen2Config(**shape, max_position_embeddings=32768, tie_word_embeddings=tied, eos_token_id=1)
        with bench.device:
            Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def learner(
    path: str,
    *,
    on_gpu: bool,
    dtype: str = "bfloat16",
    kernel: str = "auto",
    training: Mapping[str, float] | None = None,
    recompute: bool = False,
    **learners: Any,
) -> Learner:
    """A rank that trains by PPO with a critic; every weight is to move visibly."""
    config = PPOConfig().training(**{"lr": 3e-3, "critic_lr": 3e-3, "adam_eps": 1e-3, **(training or {})})
    config = config.learners(gradient_checkpointing=recompute, **learners)
    config = config.model(attn_implementation=kernel)
    compute = Device(on_gpu=on_gpu, learners_on_gpu=on_gpu, colocated=False, dtype=dtype)
    spec = learner_spec(config, path, compute=compute, keeps_state=True)
    return Learner(spec, KeptState(2))


def sequences(count: int, *, prompt: int, mean: int, longest: int, vocabulary: int) -> SequenceBatch:
    """Random ids at uneven lengths, sampled by another policy."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(prompt // 2, prompt + 1, size=count).astype(np.int32)
    lengths = np.clip(rng.gamma(4.0, mean / 4.0, size=count), 1, longest).astype(np.int32)
    tokens = int(lengths.sum())
    return SequenceBatch.single_turn(
        token_ids=rng.integers(2, vocabulary, size=int(prompts.sum()) + tokens).astype(np.int32),
        prompt_lengths=prompts,
        completion_lengths=lengths,
        sampling_logprobs=-rng.exponential(2.0, size=tokens).astype(np.float32),
        staleness=np.zeros(tokens, dtype=np.int32),
        rewards=rng.normal(size=count).astype(np.float32),
        truncated=rng.random(count) < 0.2,
        group_ids=np.arange(count) // 4,
        greedy_rewards=np.zeros(count, dtype=np.float32),
    )


def small_batch() -> SequenceBatch:
    """A dozen short ones."""
    return sequences(12, prompt=20, mean=30, longest=60, vocabulary=SMALL["vocab_size"])


def update(rank: Learner, batch: SequenceBatch, *, minibatches: int = 2, max_tokens: int = 4096) -> dict[str, float]:
    """One update as a run would plan it."""
    plan = plan_update(
        batch.lengths.tolist(),
        batch.loss_lengths.tolist(),
        num_minibatches=minibatches,
        num_epochs=1,
        num_ranks=1,
        max_tokens=max_tokens,
        attention_length=attention_length(rank.policy.model.config.hidden_size),
        packed=rank.packed,
        seed=0,
    )
    figures = rank.update(batch.select(plan.sequences[0]), plan.ranks[0])
    return figures | {"padding": plan.padding_fraction}


def scores(rank: Learner, batch: SequenceBatch) -> list[torch.Tensor]:
    """Log-probabilities of completion tokens, ``[4, T]`` for each four sequences, on the CPU."""
    found = []
    for first in range(0, len(batch), 4):
        micro = lay_out(batch, range(first, first + 4), packed=rank.packed, device=rank.policy.model.device)
        with torch.no_grad():
            found.append(rank._models.score.logprobs(micro)[micro.rows.argsort()].float().cpu())
    return found


def weights(trained: TrainedModel) -> Weights:
    """All of a model's, on the CPU."""
    return {name: full_tensor(p.detach()).float().cpu().clone() for name, p in trained.model.named_parameters()}


def farthest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest difference of two lists of log-probabilities."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def length(some: Weights, others: Weights) -> float:
    """Of the difference of two weights, as vectors."""
    return math.sqrt(sum(float((some[name] - others[name]).double().square().sum()) for name in some))


def apart(some: Weights, others: Weights, before: Weights) -> float:
    """How far apart two updates end, as a share of how far they went.

    Adam moves a weight by about the learning rate whatever its gradient is: any limit on the difference itself would
    either depend on the learning rate or let another update pass.
    """
    return length(some, others) / length(others, before)


def trained(rank: Learner, batch: SequenceBatch) -> tuple[Weights, Weights, dict[str, float], list[str]]:
    """The policy's weights before and after an update, its metrics, and which weights of any model have not moved."""
    models = {"policy": rank.policy} | ({} if rank.critic is None else {"critic": rank.critic})
    before = {name: weights(each) for name, each in models.items()}
    figures = update(rank, batch)
    after = {name: weights(each) for name, each in models.items()}
    still = [f"{m} {n}" for m in models for n in after[m] if torch.equal(before[m][n], after[m][n])]
    return before["policy"], after["policy"], figures, still


def precision(bench: Bench) -> dict[str, Any]:
    """One update in float32 on the CPU, then on the device in float32 and bfloat16."""
    path, batch = model(bench, SMALL), small_batch()
    before, on_cpu, cpu_figures, _ = trained(learner(path, on_gpu=False, dtype="float32"), batch)
    measured: dict[str, Any] = {}
    for dtype, update_within, norm_within in (("float32", 1e-3, 1e-3), ("bfloat16", 0.1, 2e-2)):
        _, after, figures, still = trained(learner(path, on_gpu=bench.on_gpu, dtype=dtype), batch)
        measured[dtype] = {"first_ratio_deviation_max": figures.get("first_ratio_deviation_max", 0.0)}
        bench.expect(f"{dtype}: weights that did not move", still, [])
        bench.at_most(f"{dtype}: update apart from the CPU's", apart(after, on_cpu, before), update_within)
        norm = abs(figures["grad_norm"] / cpu_figures["grad_norm"] - 1.0)
        bench.at_most(f"{dtype}: norm of the gradient apart from the CPU's", norm, norm_within)
    return measured


def attention_kernels(bench: Bench) -> dict[str, Any]:
    """For each kernel: whether rows are packed, and how far numbers are from the padded ones of SDPA."""
    dtype, score_within, update_within = ("bfloat16", 0.2, 0.1) if bench.on_gpu else ("float32", 1e-5, 1e-4)
    path, batch = model(bench, SMALL), small_batch()
    padded: tuple[list[torch.Tensor], Weights] | None = None
    measured: dict[str, Any] = {}
    for kernel in KERNELS if bench.on_gpu else CPU_KERNELS:
        try:
            rank = learner(path, on_gpu=bench.on_gpu, dtype=dtype, kernel=kernel)
        except Exception as error:  # Not installed, or not on this device.
            if kernel in CPU_KERNELS:
                raise
            measured[kernel] = f"does not start: {str(error).strip().splitlines()[0]}"
            continue
        logprobs = scores(rank, batch)
        before, after, _, still = trained(rank, batch)
        padded = padded or (logprobs, after)
        measured[kernel] = {"packed": rank.packed}
        bench.expect(f"{kernel}: weights that did not move", still, [])
        bench.at_most(
            f"{kernel}: log-probabilities apart from padded SDPA's", farthest(logprobs, padded[0]), score_within
        )
        bench.at_most(f"{kernel}: update apart from padded SDPA's", apart(after, padded[1], before), update_within)
    bench.expect("sdpa: rows are packed", measured["sdpa"]["packed"], False)
    bench.expect("varlen: rows are packed", measured["varlen"]["packed"], True)
    return measured


def head_chunks(bench: Bench) -> dict[str, Any]:
    """Forward and backward of the log-probabilities by logits in memory at once: milliseconds, GiB beyond inputs."""
    shapes = {"tiny": (64, 1000, 64)} if bench.tiny else {"1.5B": (1536, 151936, 8192), "7B": (3584, 152064, 8192)}
    sizes: dict[str, dict[str, int]] = {"the default": {}} | {
        f"2^{power} logits": {"max_logits": 2**power} for power in (24, 26, 28, 29)
    }
    return {
        f"{model}, {size}": _head_chunk(bench, *shape, **limit)
        for model, shape in shapes.items()
        for size, limit in sizes.items()
    }


def _head_chunk(bench: Bench, width: int, vocabulary: int, rows: int, **limit: int) -> dict[str, Any]:
    hidden = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=bench.device, dtype=torch.bfloat16)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=bench.device)

    def once() -> None:
        logprobs, _ = chunked_logprobs_and_entropy(hidden, weight, targets, **limit)  # type: ignore[arg-type]
        logprobs.sum().backward()
        hidden.grad = weight.grad = None

    once()
    before = bench.begin_peak()
    _, seconds = bench.timed(once, 2)
    peak = bench.peak_gib()
    return {"ms": 1e3 * seconds, "rows_per_s": rows / seconds, "gib": None if peak is None else peak - before}


def head_answers(bench: Bench) -> None:
    """Whether the output layer answers for single tokens, in both types, with tied weights and without."""
    for tied in (False, True):
        for dtype in ("float32", "bfloat16"):
            rank = learner(model(bench, SMALL, tied=tied), on_gpu=bench.on_gpu, dtype=dtype)
            head = rank._models.score.head
            bench.expect(f"tied {tied}, {dtype}: falls back to whole logits", head is None, False)


def long_rows(bench: Bench) -> dict[str, float]:
    """Seconds of GAE over 64 rows of 16,384 tokens; it must not cost a kernel a token."""
    steps = 256 if bench.tiny else 16384
    rewards, mask = torch.randn(64, steps, device=bench.device), torch.ones(64, steps, dtype=torch.bool)
    mask = mask.to(bench.device)

    def once() -> object:
        return gae(rewards, rewards, mask, gamma=1.0, lam=0.95, bootstrap=rewards[:, 0])

    once()
    _, seconds = bench.timed(once, 3)
    bench.at_most(f"seconds of GAE over {steps} tokens", seconds, 0.1 if bench.on_gpu else 1.0)
    return {"seconds": seconds}


def synchronizations(bench: Bench) -> dict[str, int]:
    """How often an update waits for the device, with few and with many microbatches."""
    rank, batch, found = learner(model(bench, SMALL), on_gpu=bench.on_gpu), small_batch(), {}
    update(rank, batch)
    for name, max_tokens in (("few", 4096), ("many", 80)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                update(rank, batch, minibatches=1, max_tokens=max_tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("synchroniz" in str(each.message) for each in caught)
    bench.at_most("synchronizations with many microbatches", found["many"], found["few"] + 4)
    return found


def state(bench: Bench) -> None:
    """The update after a state was recalled, or was away in host memory, is the one that followed it at first."""
    rank, batch = learner(model(bench, SMALL), on_gpu=bench.on_gpu), small_batch()
    update(rank, batch)
    before = weights(rank.policy)
    rank.keep_state(1)
    update(rank, batch)
    first = weights(rank.policy)
    for way in ("recalled", "recalled and offloaded"):
        rank.recall(1)
        if way != "recalled":
            rank.offload()
            rank.onload()
        update(rank, batch)
        # On GPUs sums of attention's backward pass depend on the order of its blocks.
        limit = 0.02 if bench.on_gpu else 0.0
        bench.at_most(f"{way}: update apart from the first", apart(weights(rank.policy), first, before), limit)


def checkpoint(bench: Bench) -> dict[str, float]:
    """Saved, trained further, loaded: the same weights to the bit."""
    rank, folder = learner(model(bench, SMALL), on_gpu=bench.on_gpu), str(bench.scratch / "checkpoint")
    update(rank, small_batch())
    before = weights(rank.policy)
    saved, stalls_s = bench.timed(lambda: rank.save(folder))
    _, writes_s = bench.timed(saved.result)
    update(rank, small_batch())
    _, loads_s = bench.timed(lambda: rank.load(folder))
    bench.at_most("distance of loaded weights from those saved", length(before, weights(rank.policy)), 0.0)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"stalls_s": stalls_s, "writes_s": writes_s, "loads_s": loads_s, "gb": size / 1e9}


def updates(bench: Bench) -> dict[str, Any]:
    """PPO with a critic at 1.5B: tokens a second, share of the chip's limit, memory."""
    offloaded = {"recompute": True, "offload_optimizer": True}
    return {
        "4k tokens per microbatch": _update(bench, count=64, mean=300, max_tokens=4096),
        "16k tokens, recomputed": _update(bench, count=64, mean=600, max_tokens=16384, recompute=True),
        "4k tokens, optimizer in CPU memory": _update(bench, count=16, mean=300, max_tokens=4096, **offloaded),
    }


def _update(bench: Bench, *, count: int, mean: int, max_tokens: int, **changes: Any) -> dict[str, Any]:
    path, vocabulary = model(bench, SMALL if bench.tiny else LARGE, tied=True), SMALL["vocab_size"]
    if bench.tiny:
        count, mean, max_tokens = 8, 30, 256
    batch = sequences(count, prompt=150, mean=mean, longest=2 * mean, vocabulary=vocabulary)
    gc.collect()
    bench.begin_peak()
    small_steps = {"lr": 1e-6, "critic_lr": 1e-5, "adam_eps": 1e-8}
    rank, start_s = bench.timed(lambda: learner(path, on_gpu=bench.on_gpu, training=small_steps, **changes))

    def once() -> dict[str, float]:
        return update(rank, batch, minibatches=4, max_tokens=max_tokens)

    def kept(version: int) -> tuple[float, float]:
        _, blocks_s = bench.timed(lambda: rank.keep_state(version))
        _, waits_s = bench.timed(rank.wait_copied)
        return blocks_s, blocks_s + waits_s

    _, first_s = bench.timed(once)
    kept(1)  # Makes its memory.
    figures, seconds = bench.timed(once)
    peak_gib = bench.peak_gib()
    blocks_s, copies_s = kept(2)
    _, offload_s = bench.timed(rank.offload)
    left_gib = float(torch.cuda.memory_allocated()) / 2**30 if bench.on_gpu else None
    _, onload_s = bench.timed(rank.onload)
    bench.expect(f"{max_tokens} tokens: rows are packed", rank.packed, bench.on_gpu)
    flops = 2 * model_flops(rank.policy.model, batch)
    return {
        "start_s": start_s,
        "first_s": first_s,
        "seconds": seconds,
        "tokens_per_s": int(batch.lengths.sum()) / seconds,
        "tflops": flops / seconds / 1e12,
        "model_flops_utilization": None if bench.peak_flops is None else flops / seconds / bench.peak_flops,
        "advantage_s": figures["advantage_s"],
        "padding": figures["padding"],
        "peak_gib": peak_gib,
        "card_gib": torch.cuda.mem_get_info()[1] / 2**30 if bench.on_gpu else None,
        "keep_state_blocks_s": blocks_s,
        "keep_state_s": copies_s,
        "offload_s": offload_s,
        "left_gib_when_offloaded": left_gib,
        "onload_s": onload_s,
    }


def model_flops(of: Any, batch: SequenceBatch, *, passes: float = 3.875) -> float:
    """Floating-point operations of one model in an update of four minibatches, recomputed activations not counted.

    A backward pass costs two forward passes; estimates take one of the critic and three quarters of one of the policy,
    whose first minibatch needs none: on average ``1 + 2 + 7/8`` forward passes.
    """
    layers, width = of.config.num_hidden_layers, of.config.hidden_size
    parameters = sum(parameter.numel() for parameter in of.parameters())
    linear: float = 2.0 * parameters * float(batch.lengths.sum())
    attention = 2.0 * layers * width * float((batch.lengths.astype(np.float64) ** 2).sum())
    return float(passes * (linear + attention))


def publication(bench: Bench) -> dict[str, float]:
    """The policy gathered into flat buckets, as it goes to engines through shared memory."""
    rank = learner(model(bench, SMALL if bench.tiny else LARGE, tied=True), on_gpu=bench.on_gpu)
    before = bench.begin_peak()

    def once() -> int:
        return sum(piece.nbytes for _, pieces in rank.weight_buckets() for piece in pieces or ())

    once()
    size, seconds = bench.timed(once)
    peak = bench.peak_gib()
    return {"gb": size / 1e9, "gb_per_s": size / 1e9 / seconds, "gib_beyond": 0.0 if peak is None else peak - before}
