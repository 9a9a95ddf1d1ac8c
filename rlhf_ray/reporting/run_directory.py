"""The folder of a run and the place of everything in it."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlhf_ray.errors import ConfigError

__all__ = ["RunDirectory", "RunLock", "kept_id", "ray_name", "write_whole"]

_LOG = logging.getLogger(__name__)

_FILE = ".lock"

_POLL_S = 0.2


class RunLock:
    """Held by the driver that writes a run directory, from its start to its stop.

    The system frees it when the process ends, however that ends. The file stays: where it was deleted, two drivers
    could hold locks on two files of one name.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path, *, wait_s: float = 0.0) -> RunLock:
        """Lock a run directory.

        Args:
            folder: The directory, which exists.
            wait_s: How long to wait for a driver that is about to end, in seconds.

        Raises:
            ConfigError: Another driver has the lock.
        """
        file = (folder / _FILE).open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        while not _locked(file):
            if time.monotonic() >= deadline:
                holder = _holder(file)
                file.close()
                remedy = f"{holder} is writing this run: stop it first, or choose another folder"
                raise ConfigError("reporting.run_dir", str(folder), remedy)
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        return cls(file)

    def release(self) -> None:
        """Let the next driver in; a second call does nothing."""
        self._file.close()


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Some network file systems know no locks.
        _LOG.warning("%s cannot be locked (%s); start no second run in its folder", file.name, error)
    return True


def _holder(file: TextIO) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):  # It holds the lock and has not said so yet.
        return "another process"


_RAY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class _Place:
    """A path in the folder of a run, which need not exist yet."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunDirectory, owner: type[RunDirectory]) -> Path:
        return run.path / self._name


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run; made with :meth:`create` or, to resume a run, :meth:`reopen`."""

    path: Path
    """Absolute, because Tune trials change the working directory."""

    config = _Place("config.yaml")
    """The resolved configuration, as YAML."""
    metrics = _Place("metrics.jsonl")
    """One flat JSON object per iteration."""
    completions = _Place("completions")
    """Folder of completion tables."""
    timeline = _Place("timeline")
    """Folder of timelines."""
    checkpoints = _Place("checkpoints")
    """Folder of checkpoints."""
    tensorboard = _Place("tensorboard")
    """Folder of TensorBoard events."""
    wandb = _Place("wandb")
    """Folder that Weights & Biases writes; it adds this name to the ``dir`` it is given."""
    mlflow = _Place("mlflow.db")
    """MLflow's database, where no tracking server is named."""
    mlflow_run_id = _Place("mlflow_run_id")
    """Which MLflow run this is."""
    model = _Place("model")
    """Folder of the trained model in Hugging Face form."""
    _id = _Place("run_id")

    @classmethod
    def at(cls, path: str | Path) -> RunDirectory:
        """Name a folder, which need not be there."""
        return cls(Path(path).expanduser().absolute())

    @classmethod
    def create(cls, run_dir: str | None, *, algorithm: str, parent: Path = Path("runs")) -> RunDirectory:
        """Make the folder of a new run.

        Args:
            run_dir: Where the user wants it (``reporting.run_dir``); unset: ``<parent>/<algorithm>-<date>-<time>``,
                with ``-2``, ``-3``, ... appended while that exists.
            algorithm: First part of the default name.
            parent: Folder of runs without a ``run_dir``.

        Raises:
            ConfigError: ``run_dir`` already holds a run, or the folder cannot be made.
        """
        if run_dir is None:
            name = f"{algorithm}-{datetime.now():%Y%m%d-%H%M%S}"
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            return cls(_make_first_free(parent.absolute(), itertools.chain([name], numbered)))
        if "://" in run_dir:
            raise ConfigError("reporting.run_dir", run_dir, "name a folder of this machine; copy it out after the run")
        directory = cls.at(run_dir)
        if cls.holds_a_run(run_dir):
            remedy = (
                "this folder already holds a run; choose another one, or null for a new one under runs/, or resume "
                "that run: rlhf-ray train --resume, or checkpointing.resume: same"
            )
            raise ConfigError("reporting.run_dir", run_dir, remedy)
        with _refused_if_unwritable(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
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
        """Name the folder of a run that is resumed, for example from a checkpoint; reporters append to it.

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

    def run_id(self) -> str:
        """What tells this run from every other, made when it is first asked for.

        Names of folders repeat and change; what a run writes elsewhere is marked by this.
        """
        return kept_id(self._id, lambda: uuid.uuid4().hex)

    def last_iteration(self) -> int:
        """The last iteration that was reported; 0 where none was."""
        return max((number for number, _ in self._lines()), default=0)

    def truncate_after(self, iteration: int) -> None:
        """Drop what later iterations reported: they are about to run again. A line that was cut short goes too."""
        if self.metrics.exists():
            kept = [f"{line}\n" for number, line in self._lines() if number <= iteration]
            write_whole(self.metrics, "".join(kept))
        for file in (*self.completions.glob("step_*.parquet"), *self.timeline.glob("step_*.json")):
            if int(file.stem.removeprefix("step_")) > iteration:
                file.unlink()

    def archive(self) -> Path | None:
        """Move what was reported into a new folder ``before-<n>``: the run is about to begin again.

        Returns:
            That folder; ``None`` where no iteration was reported.
        """
        if not self.metrics.exists() or self.metrics.stat().st_size == 0:
            return None
        aside = _make_first_free(self.path, (f"before-{number}" for number in itertools.count(1)))
        for path in (self.metrics, self.completions, self.timeline, self.tensorboard):
            if path.exists():
                path.rename(aside / path.name)
        return aside

    def write_config(self, text: str) -> None:
        """Write the resolved configuration; a reader finds all of it or what was there before."""
        write_whole(self.config, text)

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration, empty where there is none: callables and datasets are plain text there."""
        return dict(yaml.safe_load(self.config.read_text(encoding="utf-8"))) if self.config.exists() else {}

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Iteration and text of each whole line of the metrics."""
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else ():
            try:
                iteration = int(json.loads(line)["training_iteration"])
            except (ValueError, TypeError, KeyError):  # A line that was cut short.
                continue
            yield iteration, line


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


def kept_id(file: Path, make: Callable[[], str]) -> str:
    """The id in a file, made and written there when it is first asked for."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, make())
    return file.read_text(encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a file; a reader finds all of it or what was there before."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _make_first_free(parent: Path, names: Iterable[str]) -> Path:
    with _refused_if_unwritable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                (parent / name).mkdir()
            except FileExistsError:
                continue
            return parent / name
    raise AssertionError("unreachable: the names do not end")


@contextmanager
def _refused_if_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = f"the folder cannot be made ({error.strerror or type(error).__name__}); choose a writable place"
        raise ConfigError("reporting.run_dir", str(error.filename or path), remedy) from error
