"""Weights & Biases, offline in the run directory unless asked otherwise."""

from __future__ import annotations

import itertools
import netrc
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.completions import prompt_text
from rlhf_ray.reporting.metrics import Scalar
from rlhf_ray.reporting.reporter import Reporter
from rlhf_ray.reporting.run_directory import RunDirectory, kept_id
from rlhf_ray.types import ScoredGroup, TokenEstimates

__all__ = ["WandbReporter"]

# Each table is uploaded whole; the Parquet files of the run directory have all completions.
_MOST_ROWS = 64


class WandbReporter(Reporter):
    """Logs metrics and configuration to a W&B run named like the run directory; never asks for a login.

    Raises:
        ConfigError: ``wandb_mode`` is ``online`` and there is no API key.
    """

    def __init__(self, settings: Settings, run_dir: RunDirectory) -> None:
        import wandb

        mode = settings.reporting.wandb_mode
        if mode == "online":
            _require_api_key(wandb.setup().settings)
        self._run = wandb.init(
            project=settings.reporting.wandb_project,
            # One run, also where several processes continue it.
            id=kept_id(run_dir.wandb / "run_id", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir.path),
            config=run_dir.read_config(),
            mode=mode,
            # Two algorithms in one process are two W&B runs.
            reinit="create_new",
            # The console belongs to the live display, and W&B's capture would record its redraws.
            settings=wandb.Settings(console="off", silent=True),
        )

    def report(self, row: Mapping[str, Scalar]) -> None:
        """Log the iteration's numbers."""
        self._run.log(dict(row), step=int(row["training_iteration"]))

    def report_completions(
        self, step: int, groups: Sequence[ScoredGroup], estimates: Sequence[TokenEstimates] | None = None
    ) -> None:
        """Log the first of the iteration's completions as a table, with the step's other numbers."""
        import wandb

        extras = list(dict.fromkeys(name for scored in groups for name in scored.extras))
        columns = ["prompt", "completion", "reward", "finish_reason", *(f"extra/{name}" for name in extras)]
        table = wandb.Table(columns=columns, allow_mixed_types=True)
        rows = itertools.chain.from_iterable(_rows(scored, extras) for scored in groups)
        for row in itertools.islice(rows, _MOST_ROWS):
            table.add_data(*row)
        self._run.log({"completions": table}, step=step, commit=False)

    def stop(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _rows(scored: ScoredGroup, extras: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    prompt = prompt_text(scored.group.prompt.text)
    for index, completion in enumerate(scored.group.trajectories):
        logged = (scored.extras[name][index] if name in scored.extras else None for name in extras)
        yield prompt, scored.texts[index], float(scored.rewards[index]), completion.finish_reason, *logged


def _require_api_key(settings: Any) -> None:
    host = urlsplit(settings.base_url).hostname or ""
    known = settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not known and not _in_netrc(host):
        raise ConfigError(
            "reporting.wandb_mode",
            "online",
            f"there is no API key for {host}: run `wandb login` or set WANDB_API_KEY, or use offline and `wandb sync`",
        )


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        # No such file, or one that W&B cannot read either: no key.
        return False
