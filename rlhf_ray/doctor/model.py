"""Whether a model can be read, and how big it is, without loading its weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config.local_path import absolute_if_local, looks_local
from rlhf_ray.doctor.check import Check
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import load_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ModelFacts", "check_model", "count_parameters"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before it is loaded."""

    path: str
    num_parameters: int
    config: PretrainedConfig


def check_model(
    field: str, path: str, *, tokenizer_path: str | None = None, trust_remote_code: bool = False
) -> tuple[Check, ModelFacts | None]:
    """Read a model's configuration, tokenizer and the headers of its weights.

    Args:
        field: The setting that names it, for the report.
        path: Local folder or hub id.
        tokenizer_path: Where its tokenizer is; ``None``: no tokenizer is needed.
        trust_remote_code: Whether to run code that ships with the model.

    Returns:
        The check, and what was read where that worked.
    """
    remedy = f"give {field} a Hugging Face model folder or a hub id"
    if looks_local(path) and not Path(path).expanduser().is_dir():
        return Check(field, "fail", f"{path}: no such folder", remedy), None
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    try:
        # As the run itself names it: transformers takes ~ for the name of a folder.
        read_from = absolute_if_local(path)
        config = load_model_config(field, read_from, trust_remote_code=trust_remote_code)
        num_parameters = count_parameters(read_from, config, trust_remote_code=trust_remote_code)
        if tokenizer_path is not None:
            load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        return Check(field, "fail", f"{path}: {error.remedy}", f"correct {error.field}"), None
    except Exception as error:
        # transformers has no common error for "this is not a model": each kind of damage raises its own.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Check(field, "fail", f"{path}: {reason}", remedy), None
    kind = (config.architectures or [config.model_type])[0]
    size = f"{num_parameters / 1e9:.2f}B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.2f}M"
    facts = ModelFacts(read_from, num_parameters, config)
    return Check(field, "ok", f"{path}: {kind}, {size} parameters"), facts


def count_parameters(path: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Count a model's parameters, from the headers of local safetensors files, else from its architecture.

    Raises:
        ValueError: A weights file is missing, cut short, or not what its name says.
    """
    folder = Path(path).expanduser()
    if files := _weight_files(folder):
        return sum(_parameters_in(file) for file in files)
    if folder.is_dir() and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError("the folder holds no weights (*.safetensors)")
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return int(model.num_parameters())


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{index.name} names {missing[0]}, which is not there ({len(missing)} missing)")
    return [folder / name for name in sorted(names)]


def _parameters_in(file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file.name} is cut short, or no safetensors file (a Git LFS pointer?): {error}") from None
