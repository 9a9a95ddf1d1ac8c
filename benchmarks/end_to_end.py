"""Whole training steps: rlhf_ray, synchronous and asynchronous, beside TRL's GRPOTrainer and the raw work alone.

GRPO without a KL, one optimizer step a batch, on the same model, prompts, reward, sampling settings and number of
samples, one system after the other in processes of their own, and that in several rounds: where a machine drifts, it
does so for all. A figure is the median of the rounds, a ratio that of the ratios within a round. Two regimes:

- ``long tail``: 32 prompts of 8 completions by a model with random weights: lengths are geometric, mean about 97, at
  most 500 tokens;
- ``short``: 64 prompts of 4 completions by the quickstart's model, about 4 tokens each.

rlhf_ray has no gradient checkpointing, and microbatches of 4,096 tokens. ``trl`` is TRL as fast as its settings let it:
without gradient checkpointing, which it has on by default, and with the fastest of the microbatches of 8, 16, 32, 64
and 256 sequences. ``trl defaults`` is TRL as it comes: with gradient checkpointing and microbatches of 8.

``raw`` is what no system can avoid: a bare vLLM engine writes the same completions, then a bare PyTorch loop makes the
same forward and backward passes over sequences of those lengths. ``at once`` is the same two side by side, each on half
of the cores and neither waiting for the other, with all prompts handed to the engine together: what an asynchronous
trainer would come to that costs nothing.

TRL comes with ``pip install -e '.[cpu,trl]'``.

``core-s`` is the CPU time of all processes of a system, threads that spin while they wait included.

    python benchmarks/end_to_end.py [--regimes short] [--systems sync async trl raw "at once"] [--steps 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from provenance import write_result

WARM_UP = 2
TRL_WARM_UP = 1
"""Of a trainer in one process, whose first step has no more to do than the others."""
STALENESS = 4
"""Bound of the asynchronous system: what it costs in accuracy is in results/staleness.md, next to nothing."""
LR = 1e-9
"""The model stays as it is, and so do the lengths that it writes."""
MICROBATCH_TOKENS = 4096
"""Of our learner, and of raw PyTorch, which goes through the same microbatches."""
MEASURING = "measuring"
"""File in the folder: the warm-up is over."""
TOGETHER = "together"
"""File in the folder: both raw stages run at once."""
RAW_STAGES = ("raw generation", "raw training")
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What is sampled in one step."""

    prompts: int
    group_size: int
    max_new_tokens: int
    random_weights: bool
    trl_microbatch: int


REGIMES = {
    "long tail": Regime(prompts=32, group_size=8, max_new_tokens=500, random_weights=True, trl_microbatch=32),
    "short": Regime(prompts=64, group_size=4, max_new_tokens=8, random_weights=False, trl_microbatch=256),
}


def reward(*, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right sum; else a little for digits, so that groups of random text differ."""
    return [
        1.0 if text.strip() == right else 0.1 * sum(map(str.isdigit, text)) / max(1, len(text))
        for text, right in zip(completions, answer, strict=True)
    ]


def prepare(regime: Regime, folder: Path) -> None:
    """Write ``model`` and ``prompts.jsonl``."""
    import random

    from rlhf_ray.quickstart import model_path

    rng = random.Random(0)
    sums = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(4096)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not regime.random_weights:
        (folder / "model").symlink_to(model_path())
        return
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    # 97 tokens, the end of a completion one of them: where all are as likely each token ends it with probability 1/97.
    vocabulary = {chr(32 + code): code for code in range(95)} | {"<pad>": 95, "<eos>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        model_path(), vocab_size=97, pad_token_id=95, eos_token_id=96, bos_token_id=None, initializer_range=1e-3
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def ours(regime: Regime, folder: Path, steps: int, *, staleness: int) -> Figures:
    """rlhf_ray, through its public interface."""
    from rlhf_ray import GRPOConfig

    config = (
        GRPOConfig()
        .model(path=str(folder / "model"))
        .data(path=str(folder / "prompts.jsonl"), batch_size=regime.prompts)
        .rollouts(group_size=regime.group_size, max_new_tokens=regime.max_new_tokens, max_prompt_tokens=16)
        .rollouts(max_staleness=staleness)
        .rewards(reward)
        .training(lr=LR, lr_schedule="linear", kl_coef=0.0, num_minibatches=1, iterations=1000)
        .learners(max_tokens_per_microbatch=MICROBATCH_TOKENS, gradient_checkpointing=False)
        .reporting(run_dir=str(folder / "run"), progress="off", tensorboard=False, completions_interval=0)
    )
    algorithm = config.build()
    try:
        for _ in range(WARM_UP + staleness):
            algorithm.train()
        (folder / MEASURING).touch()
        busy, started, results = core_seconds(), time.perf_counter(), []
        for _ in range(steps):
            results.append(algorithm.train())
        seconds, busy = time.perf_counter() - started, core_seconds() - busy
    finally:
        algorithm.stop()
    tokens = sum(r["rollouts"]["completion_tokens_mean"] * r["rollouts"]["num_completions"] for r in results)
    timers = {name: statistics.median(r["timers"][name] for r in results) for name in results[0]["timers"]}
    return {"step_s": seconds / steps, "core_s": busy / steps, "tokens": tokens / steps} | timers


def trl(regime: Regime, folder: Path, steps: int, *, tuned: bool) -> Figures:
    """TRL's trainer; all of a step's completions are generated at once."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    microbatch = regime.trl_microbatch if tuned else GRPOConfig.per_device_train_batch_size
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=regime.prompts * regime.group_size // microbatch,
        num_generations=regime.group_size,
        max_completion_length=regime.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=LR,
        max_steps=TRL_WARM_UP + steps,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=not tuned,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    ends: list[float] = []
    busy: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            busy.append(core_seconds())
            if len(ends) == TRL_WARM_UP:
                (folder / MEASURING).touch()

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry]
    samples = regime.prompts * regime.group_size
    return {
        "step_s": (ends[-1] - ends[TRL_WARM_UP - 1]) / steps,
        "core_s": (busy[-1] - busy[TRL_WARM_UP - 1]) / steps,
        "tokens": statistics.mean(lengths[TRL_WARM_UP:]) * samples,
    }


def raw(regime: Regime, folder: Path, steps: int) -> Figures:
    """A bare engine, then a bare training loop over sequences of the lengths that it wrote."""
    generation = in_process("raw generation", regime, folder, steps)
    training = in_process("raw training", regime, folder, steps)
    return {
        "step_s": generation["step_s"] + training["step_s"],
        "core_s": generation["core_s"] + training["core_s"],
        "tokens": generation["tokens"],
        "generation_s": generation["step_s"],
        "training_s": training["step_s"],
    }


def at_once(regime: Regime, folder: Path, steps: int) -> Figures:
    """As many steps of both, side by side; the one that ends last counts."""
    in_process("raw generation", regime, folder, 1)  # the lengths
    (folder / TOGETHER).touch()
    with ThreadPoolExecutor(2) as pool:
        generation, training = pool.map(lambda stage: in_process(stage, regime, folder, steps), RAW_STAGES)
    return {
        "step_s": max(generation["step_s"], training["step_s"]),
        "core_s": generation["core_s"] + training["core_s"],
        "tokens": generation["tokens"],
        "generation_s": generation["step_s"],
        "training_s": training["step_s"],
    }


def end_warm_up(stage: str, folder: Path) -> None:
    """Of a raw stage; where both run at once they wait for each other."""
    (folder / MEASURING).touch()
    if (folder / TOGETHER).exists():
        (folder / f"{stage} is warm").touch()
        while not all((folder / f"{other} is warm").exists() for other in RAW_STAGES):
            time.sleep(0.01)


def raw_threads(folder: Path, alone: int) -> int:
    """Threads of a raw stage: ``alone``, or half of the cores beside the other one."""
    return max(1, (os.cpu_count() or 1) // 2) if (folder / TOGETHER).exists() else alone


def raw_generation(regime: Regime, folder: Path, steps: int) -> Figures:
    """Mean seconds of ``LLM.generate``; leaves the lengths in ``lengths.json``."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # The engine's is one of two processes: with all cores it takes 1.4 times as long on two.
    os.environ["OMP_NUM_THREADS"] = str(raw_threads(folder, max(1, (os.cpu_count() or 1) - 1)))
    from vllm import LLM, SamplingParams

    together = (folder / TOGETHER).exists()
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    engine = LLM(
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=16 + regime.max_new_tokens,
        max_num_seqs=regime.prompts * regime.group_size * (1 + together * STALENESS),
        enforce_eager=True,
        # As in the library: a seeded prompt whose prefill is split over two steps ends CPU engines.
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2**31,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
    seconds, busy, lengths = [], [], []
    turns = [range(step * regime.prompts, (step + 1) * regime.prompts) for step in range(WARM_UP + steps)]
    if together:
        turns[WARM_UP:] = [range(turns[WARM_UP].start, turns[-1].stop)]
    for turn, numbers in enumerate(turns):
        if turn == WARM_UP:
            end_warm_up("raw generation", folder)
        asked = [prompts[number] for number in numbers]
        params = [
            SamplingParams(
                n=regime.group_size,
                max_tokens=regime.max_new_tokens,
                temperature=1.0,
                # The i-th completion's is i more: with the same for all prompts all would have the same lengths.
                seed=number * regime.group_size,
                logprobs=0,
                # What nobody here reads.
                flat_logprobs=True,
                detokenize=False,
            )
            for number in numbers
        ]
        taken, started = core_seconds(), time.perf_counter()
        answers = engine.generate(asked, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        busy.append(core_seconds() - taken)
        lengths.append([len(choice.token_ids) for answer in answers for choice in answer.outputs])
    if not together:
        (folder / "lengths.json").write_text(json.dumps(lengths[-1]))
    return {
        "step_s": sum(seconds[WARM_UP:]) / steps,
        "core_s": sum(busy[WARM_UP:]) / steps,
        "tokens": sum(map(sum, lengths[WARM_UP:])) / steps,
    }


def raw_training(regime: Regime, folder: Path, steps: int) -> Figures:
    """Mean seconds of the learner's passes in bare PyTorch, on its own microbatches of such lengths."""
    os.environ["OMP_NUM_THREADS"] = str(raw_threads(folder, os.cpu_count() or 1))
    import numpy as np
    from bare_loop import BareLoop, sequences_of, split

    batch = sequences_of(6, np.asarray(json.loads((folder / "lengths.json").read_text()), dtype=np.int32))
    _, _, minibatches = split(batch, num_minibatches=1, max_tokens=MICROBATCH_TOKENS)
    bare = BareLoop(str(folder / "model"), critic=False)
    for _ in range(WARM_UP):
        bare.planned(minibatches)
    end_warm_up("raw training", folder)
    busy, started = core_seconds(), time.perf_counter()
    for _ in range(steps):
        bare.planned(minibatches)
    return {
        "step_s": (time.perf_counter() - started) / steps,
        "core_s": (core_seconds() - busy) / steps,
        "tokens": float(batch.completion_lengths.sum()),
    }


STAGES: dict[str, Callable[[Regime, Path, int], Figures]] = {
    "sync": lambda regime, folder, steps: ours(regime, folder, steps, staleness=0),
    "async": lambda regime, folder, steps: ours(regime, folder, steps, staleness=STALENESS),
    "trl": lambda regime, folder, steps: trl(regime, folder, steps, tuned=True),
    "trl defaults": lambda regime, folder, steps: trl(regime, folder, steps, tuned=False),
    "raw": raw,
    "at once": at_once,
    "raw generation": raw_generation,
    "raw training": raw_training,
}


def in_process(stage: str, regime: Regime, folder: Path, steps: int) -> Figures:
    """Run a stage with fresh thread pools and nothing else in memory; its figures and its peak memory in GB.

    Memory is looked at until the warm-up steps are over: counting shared pages holds the processes up.
    """
    (folder / MEASURING).unlink(missing_ok=True)
    name = next(name for name, known in REGIMES.items() if known == regime)
    arguments = ["--stage", stage, "--regimes", name, "--folder", str(folder), "--steps", str(steps)]
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        if not (folder / MEASURING).exists():
            peak = max(peak, _memory(process.pid))
        time.sleep(0.5)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"{stage} ended with {process.returncode}:\n{output}")
    figures: Figures = json.loads(output.split("RESULT")[-1].splitlines()[0])
    return figures | {"peak_gb": peak / 1e9}


def core_seconds() -> float:
    """CPU time that this process and all below it have taken so far."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _memory(pid: int) -> int:
    """Proportional set size of a process and all below it: shared pages count once."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


PAIRS = [
    ("sync", "trl"),
    ("async", "trl"),
    ("sync", "trl defaults"),
    ("async", "trl defaults"),
    ("at once", "trl"),
    ("sync", "raw"),
    ("async", "raw"),
    ("async", "at once"),
]


def ratios_of(found: dict[str, Figures]) -> Figures:
    """Of one round: completion tokens a second of one system over another's, and of Serve over a bare engine."""
    rate = {system: figures["tokens"] / figures["step_s"] for system, figures in found.items()}
    ratios = {f"{one} / {other}": rate[one] / rate[other] for one, other in PAIRS if {one, other} <= rate.keys()}
    if {"sync", "raw"} <= rate.keys():
        served = found["sync"]["tokens"] / (found["sync"]["rollout_s"] + found["sync"]["reward_s"])
        ratios["Serve with rewards / bare engine"] = served * found["raw"]["generation_s"] / found["raw"]["tokens"]
    return ratios


def spread(rounds: list[Figures]) -> dict[str, Figures]:
    """Median, least and greatest of each figure."""
    values = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    return {
        name: {"median": statistics.median(found), "min": min(found), "max": max(found)}
        for name, found in values.items()
    }


def report(name: str, regime: Regime, systems: dict[str, dict[str, Figures]], ratios: dict[str, Figures]) -> None:
    """Print one regime's tables."""
    samples = regime.prompts * regime.group_size
    print(f"\n{name}: {samples} samples a step")
    print(f"{'':<14}{'s a step':>10}{'(min - max)':>16}{'core-s':>8}{'samples/s':>11}{'tokens/s':>10}{'peak GB':>9}")
    for system, figures in systems.items():
        step, around = figures["step_s"]["median"], f"({figures['step_s']['min']:.2f} - {figures['step_s']['max']:.2f})"
        rate, core = figures["tokens"]["median"] / step, figures["core_s"]["median"]
        peak = figures["peak_gb"]["max"]
        print(f"{system:<14}{step:>10.2f}{around:>16}{core:>8.2f}{samples / step:>11.1f}{rate:>10.0f}{peak:>9.1f}")
    for pair, ratio in ratios.items():
        print(f"{pair} in tokens/s: {ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})")


def main() -> None:
    """Run every system in turn, round by round, print tables, write results/end_to_end.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--systems", nargs="+", default=["raw", "at once", "sync", "async", "trl", "trl defaults"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        regime = REGIMES[arguments.regimes[0]]
        print("RESULT", json.dumps(STAGES[arguments.stage](regime, arguments.folder, arguments.steps)))
        return
    result = {}
    for name in arguments.regimes:
        rounds = [one_round(REGIMES[name], arguments.systems, arguments.steps) for _ in range(arguments.rounds)]
        systems = {system: spread([found[system] for found in rounds]) for system in arguments.systems}
        ratios = spread([ratios_of(found) for found in rounds])
        report(name, REGIMES[name], systems, ratios)
        result[name] = {"systems": systems, "ratios": ratios}
    figures = {"steps": arguments.steps, "rounds": arguments.rounds, "regimes": result}
    print("written to", write_result("end_to_end", figures))


def one_round(regime: Regime, systems: list[str], steps: int) -> dict[str, Figures]:
    """Every system once, in turn."""
    found = {}
    for system in systems:
        with tempfile.TemporaryDirectory() as temporary:
            prepare(regime, Path(temporary))
            found[system] = in_process(system, regime, Path(temporary), steps)
        print(f"{system}: {found[system]['step_s']:.2f} s a step", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
