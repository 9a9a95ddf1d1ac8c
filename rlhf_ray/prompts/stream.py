"""Dataset rows -> prompts, in an order that can be resumed at any position.

::

    sources.py        data.path -> files, hub, Dataset, quickstart task
    rows.py           all rows, pickled, in the object store
    order.py          prompt id -> row
    reader.py         rows -> outcomes in Ray Data workers (builder.py), a few thousand ahead
    PromptStream      outcomes -> prompts: raises problems, drops what is too long, keeps the position
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.prompts.builder import Overlong, PromptBuilder
from rlhf_ray.prompts.check import check_source
from rlhf_ray.prompts.reader import PromptReader
from rlhf_ray.prompts.rows import PromptOrder
from rlhf_ray.prompts.sources import TRAINING_FIELD, find_source
from rlhf_ray.prompts.tokenizer import SharedTokenizer, load_tokenizer
from rlhf_ray.types import Prompt, PromptPosition

__all__ = ["PromptStream"]

logger = logging.getLogger(__name__)


class PromptStream(Iterator[Prompt]):
    """The prompts of a dataset, epoch after epoch. One thread at a time may use it.

    Consumes dataset rows; produces prompts; waits for Ray Data, which works ahead and needs a tenth of a CPU for it.

    Args:
        settings: The ``data`` section; for a held-out set, its own.
        tokenizer_path: Local folder or hub id.
        max_prompt_tokens: Longest prompt in tokens; longer ones are dropped or an error (``data.overlong_prompts``).
        seed: Seed of the shuffle, at least 0.
        field: The setting that names the dataset.
        epochs: Epochs after which the stream ends; ``None``: it never does.
        vocabulary_size: Rows of the model's embedding; a prompt with a token beyond them is an error.
        trust_remote_code: Whether to run code that ships with the tokenizer.
        tools: Schemas of the tools that prompts name.

    Raises:
        ConfigError: A setting is impossible on its face.
        DataError: A file or folder is missing or is not one that can be read.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        tokenizer_path: str,
        max_prompt_tokens: int,
        seed: int = 0,
        field: str = TRAINING_FIELD,
        epochs: int | None = None,
        vocabulary_size: int | None = None,
        trust_remote_code: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._source = find_source(settings, field=field)
        self._builder = PromptBuilder(
            settings,
            source_name=self._source.name,
            tokenizer_name=tokenizer_path,
            max_prompt_tokens=max_prompt_tokens,
            vocabulary_size=vocabulary_size,
            tools=tools,
        )
        self._tokenizer_path = tokenizer_path
        self._trust_remote_code = trust_remote_code
        self._seed = seed
        self._epochs = epochs
        self._position = PromptPosition()
        self._unfinished: deque[int] = deque()
        self._dropped = 0
        self._dropped_in_a_row: list[int] = []
        self._reader: PromptReader | None = None
        # Called at exit at the latest: Ray Data must stop before the interpreter goes.
        self._stop_reading: Callable[[], object] | None = None

    def check(
        self,
        check_row: Callable[[Mapping[str, Any]], None] | None = None,
        *,
        stop_token_ids: Collection[int] | None = None,
    ) -> None:
        """Find what is wrong with the data before any engine starts: in this process, in about a second for files.

        Args:
            check_row: As :func:`check_source`'s.
            stop_token_ids: What ends a completion, to be compared with the chat template; ``None``: not compared.

        Raises:
            ConfigError: The tokenizer cannot be loaded, or a setting does not go with the rows.
            DataError: The source cannot be read or is empty, one of its first rows makes no prompt, or none fits.
        """
        tokenizer = load_tokenizer(self._tokenizer_path, trust_remote_code=self._trust_remote_code)
        check_source(self._source, self._builder, tokenizer, check_row=check_row, stop_token_ids=stop_token_ids)

    def open(self) -> None:
        """Read the dataset into Ray's object store; the first prompt does it where this was not called.

        Raises:
            ConfigError: The tokenizer cannot be loaded.
            DataError: The dataset cannot be read or is empty, or is not the one that the restored position is in.
        """
        self._opened()

    def close(self) -> None:
        """Stop reading ahead and give the object store its memory back. The next prompt opens the dataset again."""
        if self._stop_reading is not None:
            self._stop_reading()
        self._stop_reading = self._reader = None

    def __next__(self) -> Prompt:
        """Return the next prompt that is short enough.

        Raises:
            ConfigError: A setting does not go with the row.
            DataError: The row makes no prompt, is too long where that is an error, or a whole epoch was too long.
        """
        reader = self._opened()
        while self._unfinished or self._position.epoch != self._epochs:
            prompt_id = self._unfinished[0] if self._unfinished else reader.order.prompt_id(self._position)
            outcome = reader.read(prompt_id)
            if self._unfinished:
                self._unfinished.popleft()
            else:
                self._position = reader.order.position(prompt_id + 1)
            if isinstance(outcome, Prompt):
                self._dropped_in_a_row.clear()
                return outcome
            self._drop(outcome, reader.order.num_rows)
        raise StopIteration

    def read_all(self, limit: int | None = None) -> tuple[Prompt, ...]:
        """Read the prompts from the first row on and close the stream; a log line tells how many were too long.

        Args:
            limit: Most prompts; ``None``: all, for a stream that ends.

        Raises:
            ConfigError: As in iteration.
            DataError: As in iteration.
        """
        self.restore(PromptPosition())
        dropped_before = self._dropped
        try:
            prompts = tuple(islice(self, limit))
        finally:
            self.close()
        if dropped := self._dropped - dropped_before:
            text = "%s: %d prompts longer than %d tokens were left out"
            logger.warning(text, self._source.name, dropped, self._builder.max_prompt_tokens)
        return prompts

    @property
    def num_rows(self) -> int:
        """Rows of the dataset, those too long included; opens the dataset."""
        return self._opened().order.num_rows

    @property
    def dropped(self) -> int:
        """Prompts that this object dropped for their length so far."""
        return self._dropped

    def state(self) -> PromptPosition:
        """Return the position of the next row, to be saved."""
        return replace(self._position, unfinished=tuple(self._unfinished))

    def restore(self, position: PromptPosition) -> None:
        """Go to a position that :meth:`state` returned; what was read ahead is thrown away.

        Raises:
            DataError: The dataset, if it is open already, has no such row.
        """
        if self._reader is not None:
            self._check_position(position, self._reader.order.num_rows)
            self._reader.close()
        self._position = replace(position, unfinished=())
        self._unfinished = deque(position.unfinished)
        self._dropped_in_a_row.clear()

    def _opened(self) -> PromptReader:
        if self._reader is None:
            table = self._source.load()
            num_rows = table.num_rows
            if num_rows == 0:
                raise DataError(f"{self._source.name} is empty: it has no rows")
            self._check_position(self._position, num_rows)
            self._reader = PromptReader(
                table=table,
                order=PromptOrder(num_rows, seed=self._seed, shuffle=self._builder.settings.shuffle),
                builder=self._builder,
                tokenizer=SharedTokenizer(self._tokenizer_path, trust_remote_code=self._trust_remote_code),
                stop=None if self._epochs is None else self._epochs * num_rows,
            )
            self._stop_reading = weakref.finalize(self, self._reader.close)
        return self._reader

    def _drop(self, overlong: Overlong, num_rows: int) -> None:
        self._dropped += 1
        self._dropped_in_a_row.append(overlong.num_tokens)
        if len(self._dropped_in_a_row) >= num_rows:
            raise self._builder.none_fits(f"none of its {num_rows} rows", min(self._dropped_in_a_row))

    def _check_position(self, position: PromptPosition, num_rows: int) -> None:
        if not 0 <= position.row < num_rows or position.epoch < 0:
            raise DataError(
                f"{self._source.name} has {num_rows} rows, so a run over it cannot be at epoch {position.epoch}, row "
                f"{position.row}; name the dataset that the run began with"
            )
