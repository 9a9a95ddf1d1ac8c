"""prompts/: dataset row -> ``Prompt``. The same code runs in the Ray Data workers and in the check before a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.row_codec import Row
from rlhf_ray.settings import DataSettings
from rlhf_ray.types import ChatMessage, Prompt, PromptText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NumberedRow", "Outcome", "Overlong", "PromptBuilder"]

# Names by which a reward function already receives the prompts and completions.
_REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedRow:
    """A row and its two numbers."""

    prompt_id: int
    dataset_row: int
    """Index in the dataset as stored, from 0; what messages name."""
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """In place of a prompt that is dropped for its length."""

    num_tokens: int


Problem: TypeAlias = DataError | ConfigError
Outcome: TypeAlias = Prompt | Overlong | DataError | ConfigError
"""What became of a row. Problems travel as values, so that each is raised when the stream reaches its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBuilder:
    """How rows become prompts; small enough to travel to every worker."""

    source_name: str
    """What messages call the dataset."""
    column: str
    template: str | None
    system_prompt: str | None
    as_chat: bool
    overlong_prompts: Literal["drop", "error"]
    max_prompt_tokens: int
    tokenizer_name: str
    """What messages call the tokenizer."""
    vocabulary_size: int | None = None
    """Rows of the model's embedding; ``None``: token ids are not compared with it."""

    @classmethod
    def from_settings(
        cls,
        settings: DataSettings,
        *,
        source_name: str,
        max_prompt_tokens: int,
        tokenizer_name: str,
        vocabulary_size: int | None = None,
    ) -> PromptBuilder:
        """Take what concerns a single row from the settings.

        Raises:
            ConfigError: ``data.prompt_template`` has no place for the prompt.
        """
        template = settings.prompt_template
        if template is not None and "{prompt}" not in template:
            raise ConfigError("data.prompt_template", template, "write {prompt} where the prompt goes")
        return cls(
            source_name=source_name,
            column=settings.prompt_column,
            template=template,
            system_prompt=settings.system_prompt,
            as_chat=settings.as_chat,
            overlong_prompts=settings.overlong_prompts,
            max_prompt_tokens=max_prompt_tokens,
            tokenizer_name=tokenizer_name,
            vocabulary_size=vocabulary_size,
        )

    def build(self, rows: Sequence[NumberedRow], tokenizer: PreTrainedTokenizerBase) -> list[Outcome]:
        """Turn rows into prompts, tokenised a batch at a time.

        Args:
            rows: ``[N]``.
            tokenizer: The model's.

        Returns:
            ``[N]``, in the same order: a prompt, or the error that says what is wrong with the row.
        """
        texts = [self._text(row) for row in rows]
        encoded = self._encode(tokenizer, rows, texts)
        return [self._outcome(row, text, ids) for row, text, ids in zip(rows, texts, encoded, strict=True)]

    def _outcome(self, row: NumberedRow, text: PromptText | Problem, token_ids: list[int] | Problem) -> Outcome:
        if isinstance(text, (DataError, ConfigError)):
            return text
        if isinstance(token_ids, (DataError, ConfigError)):
            return token_ids
        if not token_ids:
            return DataError(f"{self._where(row)}: the prompt is empty; a prompt needs at least one token")
        if self.vocabulary_size is not None and max(token_ids) >= self.vocabulary_size:
            return DataError(
                f"{self._where(row)}: the prompt has token id {max(token_ids)}, and the model's embedding ends with "
                f"{self.vocabulary_size - 1}; name the model's own tokenizer in model.tokenizer_path, or a model with "
                f"an embedding for every token of {self.tokenizer_name}"
            )
        if len(token_ids) > self.max_prompt_tokens:
            return self._overlong(row, len(token_ids))
        return Prompt(
            prompt_id=row.prompt_id,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            text=text,
            columns={name: value for name, value in row.row.items() if name != self.column},
        )

    def _overlong(self, row: NumberedRow, num_tokens: int) -> Outcome:
        if self.overlong_prompts == "drop":
            return Overlong(num_tokens=num_tokens)
        return DataError(
            f"{self._where(row)}: the prompt has {num_tokens} tokens, more than rollouts.max_prompt_tokens = "
            f"{self.max_prompt_tokens}; raise that, or set data.overlong_prompts to 'drop'"
        )

    def none_fits(self, which: str, shortest: int) -> DataError:
        """Return the error for rows of which none fits, the shortest prompt having ``shortest`` tokens."""
        return DataError(
            f"{self.source_name}: {which} fits rollouts.max_prompt_tokens = {self.max_prompt_tokens}; the shortest "
            f"prompt has {shortest} tokens"
        )

    # --- row -> text ---------------------------------------------------------------------------------------------

    def _text(self, row: NumberedRow) -> PromptText | Problem:
        try:
            self._check_columns(row)
            value = row.row[self.column]
            if isinstance(value, str):
                return self._from_string(value)
            return self._from_chat(row, value)
        except (DataError, ConfigError) as problem:
            return problem

    def _check_columns(self, row: NumberedRow) -> None:
        if self.column not in row.row:
            names = sorted(row.row)
            raise DataError(
                f"{self._where(row)}: there is no column {self.column!r}; there is {', '.join(map(repr, names))}. "
                f"{_nearest_name(self.column, names)}Set data.prompt_column"
            )
        if clashes := sorted((_REWARD_ARGUMENTS & row.row.keys()) - {self.column}):
            raise DataError(
                f"{self._where(row)}: reward functions receive the prompts and completions under the name "
                f"{clashes[0]!r}, so no column can be called that; rename it"
            )

    def _from_string(self, value: str) -> PromptText:
        # replace() and not format(): a template may hold other braces, as in \boxed{}.
        text = value if self.template is None else self.template.replace("{prompt}", value)
        if self.as_chat:
            return [*self._system_messages(), {"role": "user", "content": text}]
        if self.system_prompt is not None:
            remedy = (
                f"only a chat takes a system prompt, and column {self.column!r} of {self.source_name} holds strings; "
                "set data.as_chat to wrap them, or put the text into data.prompt_template"
            )
            raise ConfigError("data.system_prompt", self.system_prompt, remedy)
        return text

    def _from_chat(self, row: NumberedRow, value: Any) -> PromptText:
        if not isinstance(value, (list, tuple, np.ndarray)):
            kind = "null" if value is None else f"of type {type(value).__name__}"
            raise DataError(
                f"{self._where(row)}: the prompt in column {self.column!r} is {kind}; it must be a string or a chat "
                'list like [{"role": "user", "content": "..."}]'
            )
        if self.template is not None:
            remedy = f"a template goes around strings, and column {self.column!r} of {self.source_name} holds chats"
            raise ConfigError("data.prompt_template", self.template, f"{remedy}; leave it out")
        messages = [self._message(row, message) for message in value]
        if self.system_prompt is not None and messages and messages[0]["role"] == "system":
            remedy = f"{self._where(row)} begins with a system message of its own; leave data.system_prompt out"
            raise ConfigError("data.system_prompt", self.system_prompt, remedy)
        return [*self._system_messages(), *messages]

    def _message(self, row: NumberedRow, message: Any) -> ChatMessage:
        if not isinstance(message, Mapping):
            raise DataError(f"{self._where(row)}: a chat message is {message!r}; it must hold 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{self._where(row)}: {key!r} of a chat message is {message.get(key)!r}, not a string")
        # Arrow gives every message the keys of all messages and fills them with null, which templates take for there.
        return {key: value for key, value in message.items() if value is not None}

    def _system_messages(self) -> list[ChatMessage]:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]

    # --- text -> token ids -----------------------------------------------------------------------------------------

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[NumberedRow], texts: Sequence[PromptText | Problem]
    ) -> list[list[int] | Problem]:
        strings = [text for text in texts if isinstance(text, str)]
        # verbose=False: a prompt beyond the model's length is dropped or refused by the stream, which says so.
        encoded = iter(tokenizer(strings, add_special_tokens=True, verbose=False)["input_ids"] if strings else ())
        return [
            next(encoded) if isinstance(text, str) else self._encode_chat(tokenizer, row, text)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _encode_chat(
        self, tokenizer: PreTrainedTokenizerBase, row: NumberedRow, chat: list[ChatMessage] | Problem
    ) -> list[int] | Problem:
        if isinstance(chat, (DataError, ConfigError)):
            return chat
        if tokenizer.chat_template is None:
            return self._no_template(row)
        try:
            # One chat a call: a template refuses by raising, and its error must fall on the row that it is about.
            token_ids: list[int] = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
            )
        # A template is a program that came with the model: it may raise anything.
        except Exception as failure:
            return DataError(f"{self._where(row)}: the tokenizer's chat template refused the prompt: {failure}")
        return token_ids

    def _no_template(self, row: NumberedRow) -> Problem:
        missing = f"the tokenizer at {self.tokenizer_name} has no chat template"
        if isinstance(row.row[self.column], str):
            remedy = f"{missing}; leave data.as_chat out, or name a model with a chat template in model.path"
            return ConfigError("data.as_chat", True, remedy)
        return DataError(
            f"{self._where(row)}: column {self.column!r} holds chats, but {missing}; name a column of strings in "
            "data.prompt_column, or a model with a chat template (most instruct models have one) in model.path"
        )

    def _where(self, row: NumberedRow) -> str:
        return f"{self.source_name}, row {row.dataset_row} (from 0)"


def _nearest_name(wanted: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""
