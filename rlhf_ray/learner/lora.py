"""LoRA on a learner rank: adapters on frozen weights, switched off for the reference, merged for publication.

"LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), by the library PEFT. The layers are changed in
place, so that every other weight keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from rlhf_ray.errors import ConfigError
from rlhf_ray.learner.initial_weights import names_by_parameter
from rlhf_ray.weight_sync.buckets import on_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoraSpec", "Matrices", "adapters_off", "add_adapters", "merged_parameters", "tied_names"]

_ADAPTER = "default"

Matrices = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """What adapters a policy gets."""

    rank: int
    alpha: float
    """The product of an adapter's two matrices is multiplied by ``alpha / rank``."""
    targets: tuple[str, ...]
    """Names of linear layers; empty: all but the output layer. Experts that are one tensor are none."""
    seed: int
    """Of the first matrices; the second ones start at zero, so that the policy starts as it was."""


def add_adapters(model: PreTrainedModel, spec: LoraSpec) -> None:
    """Put adapters on the model's linear layers, before it is sharded, and freeze everything else.

    Raises:
        ConfigError: The model has no layer of such a name, or one that is not linear or shares its weight.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # For models that it knows PEFT turns names of linear layers into adapters of whole experts, where it meets any.
    unknown = torch.nn.ModuleDict({"model": model})
    output = model.get_output_embeddings()
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets) or "all-linear",
        exclude_modules=None if spec.targets else [name for name, m in unknown.named_modules() if m is output],
        lora_dropout=0.0,  # Sampling has none.
        bias="none",
    )
    # Every rank holds a part of each matrix, so all must draw the same ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            inject_adapter_in_model(config, unknown)
        except ValueError as error:
            layers = sorted(
                {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is torch.nn.Linear}
            )
            remedy = f"the model has no such layer; it has {', '.join(layers)}"
            raise ConfigError("model.lora_targets", list(spec.targets), remedy) from error
    tied = {name.rpartition(".")[0] for names in tied_names(model) for name in names}
    for name, layer in _adapted(model).items():
        if name in tied:
            remedy = f"{name} shares its weight with another layer, which would get its adapter too; leave it out"
        elif _ADAPTER not in layer.lora_A:  # An embedding's adapter is of another kind.
            remedy = f"{name} is no linear layer; leave it out"
        else:
            continue
        raise ConfigError("model.lora_targets", list(spec.targets), remedy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model is what it was before it got adapters."""
    layers = list(_adapted(model).values())
    for layer in layers:
        # PEFT's own switch also freezes the adapters, which FSDP has already arranged its gradients for.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_parameters(
    model: PreTrainedModel, *, every_name: bool, merge: bool = True, gathered: dict[str, Matrices] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (sharded) weights under their names in the model without adapters.

    A collective where adapters are merged: every rank iterates.

    Args:
        model: The model, with or without adapters.
        every_name: Whether a tied weight comes under each of its names, or once.
        merge: Whether adapted weights have their adapters' products added.
        gathered: Matrices of adapters by layer: taken from here where they were gathered before, else put here.
    """
    layers = _adapted(model)
    for name, parameter in model.named_parameters(remove_duplicate=not every_name):
        if _is_adapter(name):
            continue
        # PEFT keeps the layer that it adapts, weight and bias, under this name.
        owner, adapted, leaf = name.rpartition(".base_layer.")
        if not adapted:
            yield name, parameter
        elif not merge or leaf != "weight":
            yield f"{owner}.{leaf}", parameter
        else:
            if gathered is not None and owner in gathered:
                matrices = gathered.pop(owner)
            else:
                matrices = _matrices(layers[owner], parameter)
                if gathered is not None:
                    gathered[owner] = matrices
            yield f"{owner}.{leaf}", _merged(layers[owner], parameter, *matrices)


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Names in the model without adapters, of each weight that has several."""
    several = [names for names in names_by_parameter(model) if len(names) > 1]
    return [[name.replace(".base_layer.", ".") for name in names] for names in several]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _matrices(layer: Any, weight: torch.Tensor) -> Matrices:
    """An adapter's two, as they are multiplied: what is gathered is the small matrices, not their product."""
    first, second = (on_mesh(of[_ADAPTER].weight.detach()) for of in (layer.lora_A, layer.lora_B))
    if layer.fan_in_fan_out:  # GPT-2's layers have their weights the other way round.
        first, second = second.T, first.T
    if isinstance(weight, DTensor):
        first = first.redistribute(placements=[Replicate()] * len(first.placements))
        second = second.redistribute(placements=weight.placements)
    return first, second


@torch.no_grad()  # type: ignore[untyped-decorator]
def _merged(layer: Any, weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return on_mesh(weight.detach()) + layer.scaling[_ADAPTER] * (second @ first)


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
