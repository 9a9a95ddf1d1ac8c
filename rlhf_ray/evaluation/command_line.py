"""Evaluation, on the command line: what ``rlhf-ray evaluate`` measures, with which settings and on which sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import ConfigError

__all__ = ["MeasuredModel", "eval_path", "measured_model"]

_CONFIG, _MANIFEST, _MODEL = "config.yaml", "manifest.json", "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What the first argument and ``--checkpoint`` come to."""

    conf: str | None
    """File with the settings; none: the defaults."""
    checkpoint: str | None
    """Checkpoint to load; none: the model alone."""
    model_path: str | None = None
    """Model to measure; none: ``model.path`` of the settings."""


def measured_model(first: str | None, checkpoint: str | None) -> MeasuredModel:
    """Tell a checkpoint, a run's folder, a model's folder and a YAML file apart.

    Args:
        first: The first argument that is no setting.
        checkpoint: ``--checkpoint``.

    Raises:
        ConfigError: There is no such folder, or no settings for the checkpoint in it.
        DataError: A run's folder holds no complete checkpoint.
    """
    if checkpoint is not None:
        if first is not None and Path(first).is_dir():
            raise ConfigError("--checkpoint", checkpoint, f"two models are named, {first} too: leave out one")
        # Not looked into where the settings are given: it may lie in a store, such as s3://.
        return MeasuredModel(conf=first or _settings_around(checkpoint, "--checkpoint"), checkpoint=checkpoint)
    if first is None or not Path(first).is_dir():
        return MeasuredModel(conf=first, checkpoint=None)
    return _in_folder(first)


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


def _in_folder(folder: str) -> MeasuredModel:
    path = Path(folder)
    if (path / _MANIFEST).is_file():
        return MeasuredModel(conf=_settings_around(folder, "CHECKPOINT"), checkpoint=folder)
    if (path / _MODEL).is_file():
        return MeasuredModel(conf=_found_around(path), checkpoint=None, model_path=str(path.absolute()))
    newest = _newest_of_run(path)
    return MeasuredModel(conf=str(path / _CONFIG), checkpoint=newest)


def _newest_of_run(path: Path) -> str:
    from rlhf_ray.checkpoints.folder import Folder
    from rlhf_ray.checkpoints.store import CheckpointStore
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
    if not Path(checkpoint).is_dir() and "://" not in checkpoint:
        raise ConfigError(field, checkpoint, "no such folder")
    found = _found_around(Path(checkpoint)) if "://" not in checkpoint else None
    if found is None:
        raise ConfigError(field, checkpoint, f"no {_CONFIG} in it or its run directory: name CONF.yaml too")
    return found


def _found_around(path: Path) -> str | None:
    absolute = path.absolute()
    folders = (absolute, *absolute.parents[:2])
    return next((str(folder / _CONFIG) for folder in folders if (folder / _CONFIG).is_file()), None)
