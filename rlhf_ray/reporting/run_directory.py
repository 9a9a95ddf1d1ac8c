"""Before the first iteration: the folder of a run and where everything in it lies."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import unicodedata
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rlhf_ray.errors import ConfigError

__all__ = ["RunDirectory", "ray_name"]

_RAY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run; made with :meth:`create` or, to go on with a run, :meth:`reopen`."""

    path: Path
    """Absolute, because Tune trials change the working directory."""

    @classmethod
    def at(cls, path: str | Path) -> RunDirectory:
        """Name a folder, which need not be there."""
        return cls(Path(path).expanduser().absolute())

    @classmethod
    def create(cls, run_dir: str | None, *, algorithm: str, parent: Path = Path("runs")) -> RunDirectory:
        """Make the folder of a new run.

        Args:
            run_dir: Where the user wants it (``reporting.run_dir``); none: ``<parent>/<algorithm>-<date>-<time>``,
                with ``-2``, ``-3``, ... appended while that exists.
            algorithm: First part of the default name.
            parent: Folder of runs without a ``run_dir``.

        Raises:
            ConfigError: ``run_dir`` already holds a run, or the folder cannot be made.
        """
        if run_dir is None:
            return cls(_make_fresh(parent.absolute(), f"{algorithm}-{datetime.now():%Y%m%d-%H%M%S}"))
        if "://" in run_dir:
            raise ConfigError("reporting.run_dir", run_dir, "name a folder of this machine; copy it out after the run")
        directory = cls.at(run_dir)
        if cls.holds_a_run(run_dir):
            remedy = (
                "this folder already holds a run; choose another one, or null for a new one under runs/, or go on with "
                "that run: rlhf-ray train --resume, or checkpointing.resume: same"
            )
            raise ConfigError("reporting.run_dir", run_dir, remedy)
        _make(directory.path)
        return directory

    @classmethod
    def holds_a_run(cls, run_dir: str) -> bool:
        """Whether a run in a folder came as far as to report something or to complete a checkpoint.

        A start that failed leaves settings and an id, and the folder free for the next try. Settings without an id may
        be the user's own file.
        """
        directory = cls.at(run_dir)
        has_reported = directory.metrics.exists() and directory.metrics.stat().st_size > 0
        is_foreign = directory.config.exists() and not directory._id.exists()
        return has_reported or is_foreign or any(directory.checkpoints.glob("*/manifest.json"))

    @classmethod
    def reopen(cls, path: str | Path) -> RunDirectory:
        """Name the folder of a run that goes on, for example from a checkpoint; reporters append to it.

        Raises:
            ConfigError: There is no such folder.
        """
        directory = cls.at(path)
        if not directory.path.is_dir():
            raise ConfigError("reporting.run_dir", str(path), "no such folder; name the folder of an earlier run")
        return directory

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def ray_name(self) -> str:
        """The folder's name as a part of names in Ray, the same each time: see :func:`ray_name`."""
        return ray_name(self.name)

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One flat JSON object an iteration."""
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """Folder of completion tables."""
        return self.path / "completions"

    @property
    def timeline(self) -> Path:
        """Folder of timelines."""
        return self.path / "timeline"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Folder that Weights & Biases writes; it adds this name to the ``dir`` it is given."""
        return self.path / "wandb"

    @property
    def mlflow(self) -> Path:
        """MLflow's database, where no tracking server is named."""
        return self.path / "mlflow.db"

    @property
    def mlflow_run_id(self) -> Path:
        """Which MLflow run this is."""
        return self.path / "mlflow_run_id"

    @property
    def model(self) -> Path:
        """Folder of the trained model in Hugging Face form."""
        return self.path / "model"

    def run_id(self) -> str:
        """What tells this run from every other, made when it is first asked for.

        Names of folders repeat and change; what a run writes elsewhere is marked by this.
        """
        if not self._id.exists():
            _write_whole(self._id, uuid.uuid4().hex)
        return self._id.read_text(encoding="utf-8")

    @property
    def _id(self) -> Path:
        return self.path / "run_id"

    def last_iteration(self) -> int:
        """The last one that was reported; 0: none."""
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return max((row for line in lines if (row := _iteration(line)) is not None), default=0)

    def forget_after(self, iteration: int) -> None:
        """Drop what later iterations reported: they are about to run again. A line that was cut short goes too."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (row := _iteration(line)) is not None and row <= iteration]
            _write_whole(self.metrics, "".join(f"{line}\n" for line in kept))
        for file in (*self.completions.glob("step_*.parquet"), *self.timeline.glob("step_*.json")):
            if int(file.stem.removeprefix("step_")) > iteration:
                file.unlink()

    def set_aside(self) -> Path | None:
        """Move what was reported into a new folder ``before-<n>``: the run is about to begin again.

        Returns:
            That folder; none: no iteration was reported.
        """
        if not self.metrics.exists() or self.metrics.stat().st_size == 0:
            return None
        aside = _make_numbered(self.path, "before")
        for path in (self.metrics, self.completions, self.timeline, self.tensorboard):
            if path.exists():
                path.rename(aside / path.name)
        return aside

    def write_config(self, text: str) -> None:
        """Write the resolved configuration; a reader finds all of it or what was there before."""
        _write_whole(self.config, text)


def ray_name(text: str) -> str:
    """A text as an identifier of Ray: Serve applications, actors and Train runs allow few characters.

    Returns:
        The text itself where it has ASCII letters, digits, ``-`` and ``_`` alone, begins with a letter or digit, and is
        no longer than 64; else what can be kept of it, and a hash of the whole, so that different texts stay different.
    """
    if _RAY_NAME.fullmatch(text):
        return text
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9]+", "-", ascii_text).strip("-")[:40].rstrip("-")
    # A folder's name need not be UTF-8.
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{kept or 'run'}-{digest}"


def _iteration(line: str) -> int | None:
    try:
        return int(json.loads(line)["training_iteration"])
    except (ValueError, TypeError, KeyError):  # A line that was cut short.
        return None


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _make_fresh(parent: Path, name: str) -> Path:
    _make(parent)
    try:
        (parent / name).mkdir()
    except FileExistsError:
        return _make_numbered(parent, name, first=2)
    except OSError as error:
        raise _unwritable(parent / name, error) from error
    return parent / name


def _make_numbered(parent: Path, name: str, *, first: int = 1) -> Path:
    for number in itertools.count(first):
        path = parent / f"{name}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
        return path
    raise AssertionError("unreachable: itertools.count does not end")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or type(error).__name__
    return ConfigError("reporting.run_dir", str(path), f"the folder cannot be made ({reason}); choose a writable place")
