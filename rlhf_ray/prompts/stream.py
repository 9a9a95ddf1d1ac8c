"""prompts/: dataset rows -> ``Prompt``, endlessly, in an order that can be taken up again anywhere.

::

    source.py         data.path -> files, hub, Dataset, quickstart task
    row_store.py      all rows, encoded, in the object store
    order.py          prompt id -> row
    reader.py         rows -> outcomes in Ray Data workers (builder.py), a few thousand ahead
    PromptStream      outcomes -> prompts: raises problems, drops what is too long, keeps the position
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import Outcome, Overlong, PromptBuilder
from rlhf_ray.prompts.check import check_source, log_choices
from rlhf_ray.prompts.order import PromptOrder, PromptPosition
from rlhf_ray.prompts.reader import PromptReader
from rlhf_ray.prompts.shared_tokenizer import SharedTokenizer
from rlhf_ray.prompts.source import find_source
from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Prompt

__all__ = ["PromptStream"]


class PromptStream(Iterator[Prompt]):
    """The training prompts, epoch after epoch. One thread at a time may use it.

    Consumes dataset rows; produces prompts; waits for Ray Data, which works ahead and needs a tenth of a CPU for it.

    Args:
        settings: The ``data`` section.
        tokenizer_path: Local folder or hub id.
        max_prompt_tokens: Longest prompt in tokens; longer ones are dropped or an error (``data.overlong_prompts``).
        seed: Seed of the shuffle, at least 0.
        vocabulary_size: Rows of the model's embedding; a prompt with a token beyond them is an error.
        trust_remote_code: Whether to run code that ships with the tokenizer.

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
        seed: int,
        vocabulary_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._source = find_source(settings)
        self._builder = PromptBuilder.from_settings(
            settings,
            source_name=self._source.name,
            max_prompt_tokens=max_prompt_tokens,
            tokenizer_name=tokenizer_path,
            vocabulary_size=vocabulary_size,
        )
        self._tokenizer_path = tokenizer_path
        self._trust_remote_code = trust_remote_code
        self._seed = seed
        self._shuffle = settings.shuffle
        self._position = PromptPosition()
        self._unfinished: deque[int] = deque()
        self._dropped = 0
        self._dropped_in_a_row: list[int] = []
        self._reader: PromptReader | None = None
        # At most one. Ray Data must stop before the interpreter goes, so this is closed at exit at the latest.
        self._readings: list[Generator[Outcome]] = []
        self._read_next = 0
        weakref.finalize(self, _close_all, self._readings)

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
        prompts = check_source(self._source, self._builder, tokenizer, check_row)
        log_choices(prompts, self._builder, tokenizer, stop_token_ids=stop_token_ids)

    def open(self) -> None:
        """Read the dataset into Ray's object store; the first prompt does it where this was not called.

        Raises:
            ConfigError: The tokenizer cannot be loaded.
            DataError: The dataset cannot be read or is empty, or is not the one that the restored position is in.
        """
        self._opened()

    def close(self) -> None:
        """Stop reading ahead and give the object store its memory back. The next prompt opens the dataset again."""
        _close_all(self._readings)
        self._reader = None

    def __next__(self) -> Prompt:
        """Return the next prompt that is short enough.

        Raises:
            ConfigError: A setting does not go with the row.
            DataError: The row makes no prompt, is too long where that is an error, or a whole epoch was too long.
        """
        order = self._opened().order
        while True:
            prompt_id = self._unfinished[0] if self._unfinished else order.prompt_id(self._position)
            outcome = self._outcome_of(prompt_id)
            if self._unfinished:
                self._unfinished.popleft()
            else:
                self._position = order.position(prompt_id + 1)
            if isinstance(outcome, Prompt):
                self._dropped_in_a_row.clear()
                return outcome
            self._drop(outcome, order.num_rows)

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
        self._position = replace(position, unfinished=())
        self._unfinished = deque(position.unfinished)
        self._dropped_in_a_row.clear()
        _close_all(self._readings)

    def _opened(self) -> PromptReader:
        if self._reader is None:
            store = self._source.load()
            if store.num_rows == 0:
                raise DataError(f"{self._source.name} is empty: it has no rows")
            self._check_position(self._position, store.num_rows)
            order = PromptOrder(store.num_rows, seed=self._seed, shuffle=self._shuffle)
            tokenizer = SharedTokenizer(self._tokenizer_path, trust_remote_code=self._trust_remote_code)
            self._reader = PromptReader(store, order, self._builder, tokenizer)
        return self._reader

    def _outcome_of(self, prompt_id: int) -> Prompt | Overlong:
        if not self._readings:
            self._readings.append(self._opened().outcomes(prompt_id))
            self._read_next = prompt_id
        try:
            while self._read_next < prompt_id:  # Between unfinished ones lie those that are done.
                next(self._readings[0])
                self._read_next += 1
            outcome = next(self._readings[0])
            self._read_next += 1
            if isinstance(outcome, (DataError, ConfigError)):
                raise outcome
        except BaseException:
            # The position stays at this row: whoever asks again has to be answered from here, not from the next row.
            stop_all(("prompts", partial(_close_all, self._readings)))
            raise
        return outcome

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


def _close_all(readings: list[Generator[Outcome]]) -> None:
    while readings:
        readings.pop().close()
