"""The results of a finished run, on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_ray.reporting.metrics import flatten
from rlhf_ray.reporting.panel import duration, short
from rlhf_ray.reporting.run_directory import RunDirectory

__all__ = ["RunSummary", "show_accuracy", "show_evaluation", "show_quickstart", "show_samples", "show_summary"]

_SAMPLES = 6
_CELL_CHARACTERS = 200


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """Gathers a run while it trains."""

    run_dir: RunDirectory
    iterations: int = 0
    elapsed_s: float = 0.0
    rewards: list[float] = field(default_factory=list)
    """Mean reward of each iteration."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Newest metrics of each held-out set."""

    def record(self, result: Mapping[str, Any]) -> None:
        """Add the nested result of an iteration."""
        self.iterations += 1
        self.rewards.append(float(result["rollouts"]["reward_mean"]))
        self.evaluation.update(result.get("evaluation", {}))


def show_summary(console: Console, run: RunSummary) -> None:
    """Show iterations, time, reward, held-out metrics and where everything is."""
    rows = [("iterations", str(run.iterations)), ("time", duration(run.elapsed_s))]
    if run.rewards:
        rows.append(("reward", f"{short(run.rewards[0])} -> {short(run.rewards[-1])}"))
    rows += [(f"evaluation/{name}/reward_mean", short(of["reward_mean"])) for name, of in run.evaluation.items()]
    _show_pairs(console, [*rows, ("run directory", str(run.run_dir.path)), ("trained model", str(run.run_dir.model))])


def show_evaluation(console: Console, metrics: Mapping[str, Any]) -> None:
    """Show the metrics of each held-out set."""
    numbers = {key: value for key, value in flatten(metrics).items() if not isinstance(value, str)}
    _show_pairs(console, [(key, short(float(value))) for key, value in numbers.items()])


def show_accuracy(console: Console, when: str, metrics: Mapping[str, Any]) -> None:
    """Show the greedy accuracy of each held-out set in one line; ``when`` says at which point of the run."""
    for name, of_set in metrics.items():
        where = f" on {escape(name)}" if len(metrics) > 1 else ""
        accuracy = f"[bold green]{of_set['reward_mean']:.1%}[/]"
        console.print(f"held-out accuracy{where} {when} (greedy): {accuracy}", highlight=False, soft_wrap=True)


def show_quickstart(console: Console, before: Mapping[str, Any], after: Mapping[str, Any], run: RunSummary) -> None:
    """Show sampled completions, held-out accuracy before and after, and what to do next.

    Args:
        console: Where to print.
        before: Metrics of each held-out set before training.
        after: The same after training.
        run: The training between the two.
    """
    show_samples(console, run.run_dir)
    console.print()
    show_accuracy(console, "before training", before)
    show_accuracy(console, "after training", after)
    console.print(f"{run.iterations} iterations in {duration(run.elapsed_s)}", highlight=False)
    console.print("\n[bold]next[/]")
    folder = run.run_dir.path
    _show_pairs(
        console,
        [
            ("what it wrote", str(folder)),
            ("trained model", str(run.run_dir.model)),
            ("curves", f"tensorboard --logdir {run.run_dir.tensorboard}"),
            ("your own task", "rlhf-ray config > conf.yaml, then edit model, data and rewards"),
            ("", "rlhf-ray doctor conf.yaml, rlhf-ray train conf.yaml"),
        ],
    )


def show_samples(console: Console, run_dir: RunDirectory) -> None:
    """Show one completion per prompt for some prompts of the newest completion table, if the run wrote any."""
    import pyarrow.parquet as pq

    tables = sorted(run_dir.completions.glob("step_*.parquet"))
    rows = pq.read_table(tables[-1]).to_pylist() if tables else []
    if not rows:
        return
    first_of_group = {row["group_id"]: row for row in reversed(rows)}
    table = Table(box=None, title=f"sampled in iteration {rows[0]['step']}", title_justify="left", padding=(0, 3, 0, 0))
    for column in ("prompt", "completion", ""):
        table.add_column(column, justify="left")
    for row in list(reversed(first_of_group.values()))[:_SAMPLES]:
        verdict = Text("right", style="green") if row["reward"] > 0 else Text("wrong", style="red")
        table.add_row(_cell(row["prompt"]), _cell(row["completion"]), verdict)
    console.print()
    console.print(table)


def _cell(text: str) -> Text:
    # Byte-level models write control characters; a raw one would move the cursor.
    visible = "".join(char if char.isprintable() else "?" for char in text[:_CELL_CHARACTERS])
    return Text(visible)


def _show_pairs(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        # No wrapping: a path that is cut in two cannot be copied.
        console.print(f"[cyan]{escape(f'{name:<{width}}')}[/]  {escape(value)}", soft_wrap=True, highlight=False)
