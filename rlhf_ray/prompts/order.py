"""Which row comes when: a function of the seed, the epoch and the number of rows, nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlhf_ray.types import PromptPosition

__all__ = ["Int64Array", "PromptOrder"]

Int64Array = npt.NDArray[np.int64]


class PromptOrder:
    """Maps prompt ids to dataset rows: prompt ``epoch * num_rows + i`` is the i-th row of that epoch's order.

    A run therefore resumes exactly where it stopped, on a cluster of any size: neither the number of workers nor the
    way that files were split into blocks matters.

    Args:
        num_rows: Rows of the dataset.
        seed: Seed of the shuffle, at least 0.
        shuffle: Whether each epoch has its own order; else rows come as they are.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._cached: tuple[int, Int64Array] | None = None

    def dataset_rows(self, start: int, stop: int) -> Int64Array:
        """Return ``[stop - start]``, the dataset row of each prompt id in ``start <= id < stop``."""
        prompt_ids = np.arange(start, stop, dtype=np.int64)
        if not self._shuffle:
            return prompt_ids % self.num_rows
        parts = [
            self._permutation(epoch)[max(start - epoch * self.num_rows, 0) : stop - epoch * self.num_rows]
            for epoch in range(start // self.num_rows, -(-stop // self.num_rows))
        ]
        return np.concatenate([prompt_ids[:0], *parts])

    def prompt_id(self, position: PromptPosition) -> int:
        """Return the id of the prompt at a position."""
        return position.epoch * self.num_rows + position.row

    def position(self, prompt_id: int) -> PromptPosition:
        """Return the position of a prompt id."""
        epoch, row = divmod(prompt_id, self.num_rows)
        return PromptPosition(epoch=epoch, row=row)

    def _permutation(self, epoch: int) -> Int64Array:
        if self._cached is None or self._cached[0] != epoch:
            # Sorting raw bits and not Generator.permutation: numpy keeps only bit streams the same in every release.
            keys = np.random.PCG64([self._seed, epoch]).random_raw(self.num_rows)
            self._cached = (epoch, np.argsort(keys, kind="stable"))
        return self._cached[1]
