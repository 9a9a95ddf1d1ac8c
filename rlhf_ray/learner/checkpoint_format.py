"""Weights as a checkpoint has them, for publications and exports, where memory has another form of them.

Transformers joins the experts of a layer, say, to one tensor when it loads them, and renames some layers; checkpoints,
and so vLLM, know the separate ones. Consumes a (sharded) model; produces tensors by checkpoint name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from rlhf_ray.learner.lora import Matrices, merged_parameters, tied_names
from rlhf_ray.weight_sync.buckets import full_tensor, staged
from rlhf_ray.weight_sync.manifest import joined_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CheckpointFormat"]

Names = tuple[str, ...]
Shape = tuple[int, ...]


class CheckpointFormat:
    """What transformers does when it saves a model, for one parameter after the other instead of all at once.

    Args:
        model: The model, which remembers how its checkpoint was converted.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Without the adapters' products, which every rank would have to compute for the shapes alone.
        bare = merged_parameters(model, every_name=True, merge=False)
        empty = {name: torch.empty(parameter.shape, device="meta") for name, parameter in bare}
        saved = self._converted(empty)
        unchanged = {id(tensor): name for name, tensor in saved.items()}
        self._names = {name: unchanged[id(tensor)] for name, tensor in empty.items() if id(tensor) in unchanged}
        ties = [[name for name in names if name in self._names] for names in tied_names(model)]
        self._repeated = {name for names in ties for name in names[1:]}
        stored = [[self._names[name] for name in names] for names in ties if names]
        self._joined = {names[0]: joined_names(names) for names in stored}
        changed = {name: tensor for name, tensor in empty.items() if name not in self._names}
        wanted = {name: tuple(saved[name].shape) for name in saved.keys() - self._names.values()}
        self._groups = {name: group for group in self._split(changed, wanted) for name in group}
        self.shapes: list[tuple[str, Shape]] = [
            (name, tuple(tensor.shape)) for name, tensor in self._published(empty.items())
        ]
        """Name and full shape of each tensor that :meth:`tensors` yields for engines, in its order."""
        self._gathered: dict[str, Matrices] = {}

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights, adapters merged, under their names in memory.

        What is gathered of adapters is kept for what is published next, unless :meth:`forget` is called.
        """
        self.forget()
        return merged_parameters(self._model, every_name=False, gathered=self._gathered)

    def forget(self) -> None:
        """Drop what is kept of adapters, before they change."""
        self._gathered.clear()

    def tensors(
        self, *, every_name: bool = True, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a checkpoint's tensors, adapters merged: parameters as they are, sharded; what is converted gathered.

        Each comes once. A gather is a collective, so every rank must iterate to the end.

        Args:
            every_name: Whether a tied weight comes under all its names, joined, as engines are sent it; else under its
                first one, as a checkpoint has it.
            dtype: What is gathered is gathered in this type: conversions move numbers and compute none; ``None``: in
                its own.
        """
        parameters = self._parameters(every_name=every_name)
        return self._published(parameters, dtype) if every_name else self._stored(parameters, dtype)

    def staged(self, dtype: torch.dtype) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
        """Copy this rank's part of what :meth:`tensors` yields for engines to host memory; the call yields it.

        What is converted is gathered and converted within the call, one group after the other.
        """
        copies = staged(self._once(self._parameters(every_name=True)), dtype)
        return lambda: self._published(copies(), dtype)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds besides parameters, such as the biases that balance a router's experts."""
        stored = self._model.state_dict().keys()
        return self._converted({name: buffer for name, buffer in self._model.named_buffers() if name in stored})

    def _parameters(self, *, every_name: bool) -> Iterator[tuple[str, torch.Tensor]]:
        gathered, self._gathered = self._gathered, {}
        return merged_parameters(self._model, every_name=every_name, gathered=gathered or None)

    def _published(
        self, parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """For engines, of parameters under every name."""
        stored = self._stored(self._once(parameters), dtype)
        return ((self._joined.get(name, name), tensor) for name, tensor in stored)

    def _once(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter) for name, parameter in parameters if name not in self._repeated)

    def _stored(
        self, parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[Names, dict[str, torch.Tensor]] = {}
        for name, parameter in parameters:
            group = self._groups.get(name)
            if group is None:
                yield self._names[name], parameter
                continue
            waiting.setdefault(group, {})[name] = full_tensor(parameter.detach(), dtype)
            if len(waiting[group]) == len(group):
                yield from self._pieces(waiting.pop(group))
        for gathered in waiting.values():  # The rest of their groups is tied to others.
            yield from self._pieces(gathered)

    def _pieces(self, gathered: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        made = self._converted(gathered)
        gathered.clear()  # All that it held is in the pieces, and experts are large.
        if any(tensor.is_cuda for tensor in made.values()):
            # vLLM's sender asks for the pieces in several streams in turn.
            torch.cuda.current_stream().synchronize()
        yield from made.items()

    def _split(self, changed: Mapping[str, torch.Tensor], wanted: Mapping[str, Shape]) -> list[Names]:
        """Group names so that each group by itself is converted to what it is converted to among all."""
        try:
            groups = self._sharing(changed)
            made = {name: tuple(t.shape) for group in groups for name, t in self._converted(group).items()}
        except Exception:  # An operation that cannot do with less than all it takes.
            return [tuple(changed)]
        return [tuple(group) for group in groups] if made == wanted else [tuple(changed)]

    def _sharing(self, changed: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Put names together that are converted to tensors of the same name."""
        groups: list[tuple[set[str], dict[str, torch.Tensor]]] = []
        for name, tensor in changed.items():
            made: set[str] = set(self._converted({name: tensor}))
            together: dict[str, torch.Tensor] = {}
            apart = [group for group in groups if not made & group[0]]
            for other_made, others in groups:
                if made & other_made:
                    made, together = made | other_made, together | others
            groups = [*apart, (made, together | {name: tensor})]
        return [together for _, together in groups]

    def _converted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        converted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return converted
