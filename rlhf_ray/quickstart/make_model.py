"""Makes the embedded quickstart models: supervised learning on demonstrations, stopped where PPO can take over.

Run it with ``python -m rlhf_ray.quickstart.make_model --output DIR``, and ``--task calculator`` for the model of the
multi-turn quickstart; the same seed gives the same model on the same machine and versions. It stops at the first check
at which the greedy accuracy reaches the target: an early point of a fast-climbing run. A slow run's model of the same
accuracy gives right answers no chance where it is wrong, and reinforcement learning cannot find what it never samples.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from rlhf_ray.quickstart import calculator
from rlhf_ray.quickstart import task as addition
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, build_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

__all__ = ["CALCULATOR", "SUM", "Accuracy", "Task", "main", "make_model", "measure", "new_model"]

_LOG = logging.getLogger(__name__)
_POSITIONS = 2048
_TARGET = 0.45
_BATCH_ROWS = 128
_LEARNING_RATE = 2.5e-3
_WARM_UP_STEPS = 100
_CHECK_INTERVAL = 2
_IGNORED = -100


Row: TypeAlias = dict[str, str]
Demonstration: TypeAlias = Sequence[tuple[str, str]]
"""Turn by turn, what the policy reads and what it should write; the end of the sequence follows each of the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a model is made for."""

    description: str
    train_rows: Callable[[], list[Row]]
    eval_rows: Callable[[], list[Row]]
    demonstrate: Callable[[Row], Demonstration]


def _sum(row: Row) -> Demonstration:
    return [(row["prompt"], row["answer"])]


def _calls(row: Row) -> Demonstration:
    first, second, third = map(int, row["prompt"].removesuffix("=").split("+"))
    part = first + second
    return [(row["prompt"], f"{first}+{second}"), (f"{part};", f"{part}+{third}"), (f"{part + third};", row["answer"])]


SUM: Final = Task(
    description="two-digit addition",
    train_rows=addition.train_rows,
    eval_rows=addition.eval_rows,
    demonstrate=_sum,
)
CALCULATOR: Final = Task(
    description="three-number sums with a calculator",
    train_rows=calculator.train_rows,
    eval_rows=calculator.eval_rows,
    demonstrate=_calls,
)
_TASKS: Final = {"sum": SUM, "calculator": CALCULATOR}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Held-out accuracy."""

    sampled: float
    """Expected at temperature 1: the mean probability of writing what was demonstrated, in all turns."""
    greedy: float

    def __str__(self) -> str:
        """Both, as log lines give them."""
        return f"sampled {self.sampled:.3f}  greedy {self.greedy:.3f}"


def new_model(seed: int) -> Qwen2ForCausalLM:
    """A freshly initialized Qwen2 of 0.8 million parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        # Wider than the usual 0.02: a model this narrow leaves the first plateau three times sooner.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )
    return Qwen2ForCausalLM(config)


def measure(model: Qwen2ForCausalLM, rows: Sequence[Row], task: Task = SUM) -> Accuracy:
    """Measure both accuracies in one teacher-forced pass.

    The greedy policy writes what was demonstrated exactly when each of its tokens is the likeliest after those before
    it. Another way to a right answer, such as calls in another order, does not count.
    """
    ids, labels = _tensors(rows, task)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    targets = labels[:, 1:]
    counted = targets != _IGNORED
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    right = (logits.argmax(-1) == targets) | ~counted
    return Accuracy(sampled=float((logprobs * counted).sum(1).exp().mean()), greedy=float(right.all(1).float().mean()))


def make_model(
    output: Path, task: Task = SUM, *, seed: int = 0, target: float = _TARGET, max_steps: int = 2000
) -> Accuracy:
    """Train, stop at the target, write model and tokenizer.

    Args:
        output: Folder to write.
        task: What to train on.
        seed: Of the initialization and the order of the rows.
        target: Greedy held-out accuracy to stop at.
        max_steps: Steps after which it stops short of the target.

    Returns:
        The accuracies of what was written.
    """
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    ids, labels = _tensors(task.train_rows(), task)
    held_out = task.eval_rows()
    batches = _batches(len(ids), torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    accuracy = measure(model, held_out, task)
    for step in range(1, max_steps + 1):
        rows = next(batches)
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, step / _WARM_UP_STEPS)
        logits = model(ids[rows]).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[rows][:, 1:].flatten(), ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _CHECK_INTERVAL == 0 or step == max_steps:
            accuracy = measure(model, held_out, task)
            told = f"loss {float(loss.detach()):.3f}  {accuracy}"
            _LOG.info("step %4d  %s  %.0f s", step, told, time.perf_counter() - started)
            if accuracy.greedy >= target:
                break
    _write(model, output, task=task, accuracy=accuracy, seed=seed, steps=step)
    return accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--task", choices=list(_TASKS), default="sum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=_TARGET, help="greedy held-out accuracy to stop at")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_model(arguments.output, _TASKS[arguments.task], seed=arguments.seed, target=arguments.target)


def _tensors(rows: Sequence[Row], task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, L]`` token ids and labels: what is written and its end are learned, what is read is ignored."""
    encoded = [_encoded(task.demonstrate(row)) for row in rows]
    width = max(len(tokens) for tokens, _ in encoded)
    ids = torch.full((len(encoded), width), PAD_TOKEN_ID)
    labels = torch.full((len(encoded), width), _IGNORED)
    for index, (tokens, learned) in enumerate(encoded):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, : len(tokens)] = torch.tensor(learned)
    return ids, labels


def _encoded(demonstration: Demonstration) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    labels: list[int] = []
    for read, written in demonstration:
        learned = [*written.encode(), EOS_TOKEN_ID]
        tokens += [*read.encode(), *learned]
        labels += [_IGNORED] * len(read.encode()) + learned
    return tokens, labels


def _batches(num_rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from order[: num_rows // _BATCH_ROWS * _BATCH_ROWS].view(-1, _BATCH_ROWS)


def _write(model: Qwen2ForCausalLM, output: Path, *, task: Task, accuracy: Accuracy, seed: int, steps: int) -> None:
    model.save_pretrained(output)
    build_tokenizer(max_length=_POSITIONS).save_pretrained(output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (output / "README.md").write_text(
        "# Quickstart model\n\n"
        f"A Qwen2 of {parameters:,} parameters over bytes, trained from scratch on {task.description} by "
        f"`rlhf_ray/quickstart/make_model.py` (seed {seed}, {steps} steps).\n\n"
        f"Held-out accuracy: {accuracy.sampled:.3f} sampled at temperature 1, {accuracy.greedy:.3f} greedy. "
        "It is meant as a starting point for reinforcement learning and for nothing else.\n"
    )


if __name__ == "__main__":
    main()
