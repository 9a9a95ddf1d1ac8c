"""What ``rlhf-ray evaluate`` measures: with which settings, which model or checkpoint, and on which sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import ConfigError

__all__ = ["MeasuredModel", "eval_path", "measured_model"]

_CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What the first argument and ``--checkpoint`` come to."""

    conf: str | None = None
    """File with the settings; ``None``: the defaults."""
    checkpoint: str | None = None
    """Checkpoint to load; ``None``: the model alone."""
    model_path: str | None = None
    """Model to measure; ``None``: ``model.path`` of the settings."""


def measured_model(first: str | None, checkpoint: str | None) -> MeasuredModel:
    """Tell a checkpoint, a run's folder, a model's folder and a YAML file apart.

    Args:
        first: The first argument that is no setting.
        checkpoint: ``--checkpoint``.

    Raises:
        ConfigError: There is no such folder, or no settings for the checkpoint in it.
        DataError: A run's folder holds no complete checkpoint.
    """
    folder = Path(first) if first is not None and Path(first).is_dir() else None
    if checkpoint is not None:
        if folder is not None:
            raise ConfigError("--checkpoint", checkpoint, f"two models are named, {first} too: leave out one")
        # Not looked into where the settings are given: it may lie in a store, such as s3://.
        return MeasuredModel(conf=first or _settings_around(checkpoint, "--checkpoint"), checkpoint=checkpoint)
    if folder is None:
        return MeasuredModel(conf=first)
    if (folder / "manifest.json").is_file():
        return MeasuredModel(conf=_settings_around(str(first), "CHECKPOINT"), checkpoint=first)
    if (folder / "config.json").is_file():
        return MeasuredModel(conf=_found_around(folder), model_path=str(folder.absolute()))
    return MeasuredModel(conf=str(folder / _CONFIG), checkpoint=_newest_of_run(folder))


def eval_path(given: Sequence[str]) -> dict[str, str]:
    """``--data`` values, each ``DATASET`` or ``NAME=DATASET``, as ``data.eval_path``.

    Raises:
        ConfigError: Two sets have one name, or nothing follows a name.
    """
    sets: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:  # A folder may have an = in its name.
            name, path = Path(text).stem, text
        if not path:
            raise ConfigError("--data", text, "a dataset's path follows the name: --data NAME=FILE")
        if name in sets:
            raise ConfigError("--data", text, f"two sets are called {name}: write --data NAME=FILE")
        sets[name] = path
    return sets


def _newest_of_run(path: Path) -> str:
    from rlhf_ray.checkpoints.checkpoint import CheckpointStore
    from rlhf_ray.checkpoints.folder import Folder
    from rlhf_ray.config.builder import AlgorithmConfig
    from rlhf_ray.errors import DataError
    from rlhf_ray.reporting.run_directory import RunDirectory

    directory = RunDirectory.at(path)
    if not directory.config.is_file():
        remedy = "it holds neither a checkpoint, a run nor a model; name a folder that does, or CONF.yaml"
        raise ConfigError("CHECKPOINT", str(path), remedy)
    checkpoints = AlgorithmConfig.from_yaml(directory.config).settings.checkpointing.path or directory.checkpoints
    newest = CheckpointStore(Folder.at(checkpoints)).newest()
    if newest is None:
        raise DataError(f"{path} holds no complete checkpoint; the run's trained model may be in {directory.model}")
    return newest.folder.location


def _settings_around(checkpoint: str, field: str) -> str:
    in_store = "://" in checkpoint
    if not in_store and not Path(checkpoint).is_dir():
        raise ConfigError(field, checkpoint, "no such folder")
    found = None if in_store else _found_around(Path(checkpoint))
    if found is None:
        raise ConfigError(field, checkpoint, f"no {_CONFIG} in it or its run directory: name CONF.yaml too")
    return found


def _found_around(path: Path) -> str | None:
    absolute = path.absolute()
    files = [folder / _CONFIG for folder in (absolute, *absolute.parents[:2])]
    return next((str(file) for file in files if file.is_file()), None)
