"""prompts/: dataset row -> ``Prompt``. The same code runs in the Ray Data workers and in the check before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from rlhf_ray.config.settings import REWARD_ARGUMENTS, DataSettings
from rlhf_ray.config.user_code import close_match
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.chat_template import read_chat_template, template_variables
from rlhf_ray.prompts.row_codec import Row
from rlhf_ray.prompts.text_encoding import special_tokens_around, text_flaw, with_special_tokens
from rlhf_ray.types import ChatMessage, Prompt, PromptText
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NumberedRow", "Outcome", "Overlong", "PromptBuilder"]

# The column with a row's own arguments of the chat template, and the arguments that are not for the user to set.
_ARGUMENTS_COLUMN = "chat_template_kwargs"
_OWN_ARGUMENTS = frozenset({"messages", "add_generation_prompt"})


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
    chat_template: str | None
    """The text of a template in place of the tokenizer's."""
    chat_template_kwargs: Mapping[str, Any]
    final_assistant: Literal["continue", "drop"] | None
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
            ConfigError: ``data.prompt_template`` has no place for the prompt, or ``data.chat_template`` is none.
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
            chat_template=read_chat_template(settings.chat_template),
            chat_template_kwargs=settings.chat_template_kwargs,
            final_assistant=settings.final_assistant,
            overlong_prompts=settings.overlong_prompts,
            max_prompt_tokens=max_prompt_tokens,
            tokenizer_name=tokenizer_name,
            vocabulary_size=vocabulary_size,
        )

    def build(self, rows: Sequence[NumberedRow], tokenizer: PreTrainedTokenizerBase) -> list[Outcome]:
        """Turn rows into prompts, tokenized a batch at a time.

        Args:
            rows: ``[N]``.
            tokenizer: The model's.

        Returns:
            ``[N]``, in the same order: a prompt, or the error that says what is wrong with the row.
        """
        texts = [self._text(row) for row in rows]
        rendered = [self._rendered(tokenizer, row, text) for row, text in zip(rows, texts, strict=True)]
        encoded = self._encode(tokenizer, rows, texts, rendered)
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
                return self._from_string(row, value)
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
        if clashes := sorted((REWARD_ARGUMENTS & row.row.keys()) - {self.column}):
            raise DataError(
                f"{self._where(row)}: reward functions receive something else under the name {clashes[0]!r}, so no "
                "column can be called that; rename it"
            )

    def _from_string(self, row: NumberedRow, value: str) -> PromptText:
        # replace() and not format(): a template may hold other braces, as in \boxed{}.
        text = value if self.template is None else self.template.replace("{prompt}", value)
        if self.as_chat:
            return [*self._system_messages(), {"role": "user", "content": text}]
        for name in ("system_prompt", "chat_template", "chat_template_kwargs"):
            if given := getattr(self, name):
                remedy = (
                    f"it is for chats alone, and column {self.column!r} of {self.source_name} holds strings; set "
                    "data.as_chat to wrap them, or leave it out (data.prompt_template goes around strings)"
                )
                raise ConfigError(f"data.{name}", given, remedy)
        if row.row.get(_ARGUMENTS_COLUMN) is not None:
            raise DataError(
                f"{self._where(row)}: column {_ARGUMENTS_COLUMN!r} holds arguments of a chat template, and the prompt "
                "is a string; set data.as_chat to wrap it, or rename the column"
            )
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
        if self.final_assistant == "drop":
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if len(value) and not messages:
                raise DataError(
                    f"{self._where(row)}: the chat holds assistant messages alone, so none is left to answer"
                )
        if self.system_prompt is not None and messages and messages[0]["role"] == "system":
            remedy = f"{self._where(row)} begins with a system message of its own; leave data.system_prompt out"
            raise ConfigError("data.system_prompt", self.system_prompt, remedy)
        return [*self._system_messages(), *messages]

    def _message(self, row: NumberedRow, message: Any) -> ChatMessage:
        if not isinstance(message, Mapping):
            raise DataError(
                f"{self._where(row)}: a chat message is {shortened(repr(message))}; it must hold 'role' and 'content'"
            )
        # As OpenAI writes the calls of tools; templates take a null for something that is there.
        content = {"content": ""} if message.get("tool_calls") and message.get("content") is None else {}
        given = {key: value for key, value in message.items() if value is not None} | content
        for key in ("role", "content"):
            if not isinstance(given.get(key), str):
                raise DataError(
                    f"{self._where(row)}: {key!r} of a chat message is {shortened(repr(given.get(key)))}, not a string"
                )
        return given

    def _system_messages(self) -> list[ChatMessage]:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]

    # --- text -> token ids -----------------------------------------------------------------------------------------

    def _rendered(
        self, tokenizer: PreTrainedTokenizerBase, row: NumberedRow, text: PromptText | Problem
    ) -> str | Problem:
        """What is tokenized: a string itself, or a chat as its template writes it."""
        try:
            rendered = self._render(tokenizer, row, text) if isinstance(text, list) else text
        except (DataError, ConfigError) as problem:
            return problem
        if isinstance(rendered, str) and (flaw := text_flaw(rendered)):
            return DataError(f"{self._where(row)}: the prompt in column {self.column!r} {flaw}")
        return rendered

    def _render(self, tokenizer: PreTrainedTokenizerBase, row: NumberedRow, chat: list[ChatMessage]) -> str:
        arguments = self._template_arguments(tokenizer, row)
        continued = bool(chat) and chat[-1]["role"] == "assistant"
        if continued and chat[-1].get("tool_calls"):
            raise DataError(
                f"{self._where(row)}: the chat ends in calls of tools, which a completion cannot continue; set "
                "data.final_assistant to 'drop'"
            )
        try:
            rendered: str = tokenizer.apply_chat_template(
                chat,
                chat_template=self.chat_template,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                tokenize=False,
                **arguments,
            )
        # A template is a program that came with the model: it may raise anything.
        except Exception as failure:
            whose = "the tokenizer's chat template" if self.chat_template is None else "data.chat_template"
            raise DataError(f"{self._where(row)}: {whose} refused the prompt: {shortened(failure)}") from failure
        return rendered

    def _template_arguments(self, tokenizer: PreTrainedTokenizerBase, row: NumberedRow) -> Mapping[str, Any]:
        if tokenizer.chat_template is None and self.chat_template is None:
            raise self._no_template(row)
        own = row.row.get(_ARGUMENTS_COLUMN) if self.column != _ARGUMENTS_COLUMN else None
        if own is not None and not isinstance(own, Mapping):
            raise DataError(
                f"{self._where(row)}: {_ARGUMENTS_COLUMN!r} is {shortened(repr(own), 80)}, not a mapping of arguments"
            )
        arguments = {**self.chat_template_kwargs, **(own or {})}
        if arguments:
            template = tokenizer.get_chat_template(self.chat_template, tools=arguments.get("tools"))
            known = template_variables(template) - _OWN_ARGUMENTS
            for name in arguments.keys() - known:
                remedy = f"the chat template does not read {name!r}; it reads {', '.join(sorted(known))}"
                if own and name in own:
                    raise DataError(f"{self._where(row)}: in column {_ARGUMENTS_COLUMN!r}, {remedy}")
                raise ConfigError("data.chat_template_kwargs", dict(self.chat_template_kwargs), remedy)
        return arguments

    def _encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[NumberedRow],
        texts: Sequence[PromptText | Problem],
        rendered: Sequence[str | Problem],
    ) -> list[list[int] | Problem]:
        bare = iter(self._tokenize(tokenizer, [text for text in rendered if isinstance(text, str)]))
        # A template writes the special tokens of a chat itself.
        before = special_tokens_around(tokenizer)[0] if any(isinstance(text, str) for text in texts) else []
        encoded: list[list[int] | Problem] = []
        for row, text, tokenized in zip(rows, texts, rendered, strict=True):
            ids = next(bare) if isinstance(tokenized, str) else tokenized
            if isinstance(ids, Exception) and not isinstance(ids, (DataError, ConfigError)):
                ids = DataError(f"{self._where(row)}: the tokenizer refused the prompt: {shortened(ids)}")
            encoded.append(with_special_tokens(ids, before) if isinstance(ids, list) and isinstance(text, str) else ids)
        return encoded

    @staticmethod
    def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int] | Exception]:
        """Token ids without special tokens; where the tokenizer refuses a text, its error in their place."""
        try:
            # verbose=False: a prompt beyond the model's length is dropped or refused by the stream, which says so.
            return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []
        # What a tokenizer raises is its own affair; it must fall on the text that it is about, not on the batch.
        except Exception as failure:
            if len(texts) == 1:
                return [failure]
            return [ids for text in texts for ids in PromptBuilder._tokenize(tokenizer, [text])]

    def _no_template(self, row: NumberedRow) -> Problem:
        missing = f"the tokenizer at {self.tokenizer_name} has no chat template"
        if isinstance(row.row[self.column], str):
            remedy = f"{missing}; leave data.as_chat out, or give data.chat_template"
            return ConfigError("data.as_chat", True, remedy)
        return DataError(
            f"{self._where(row)}: column {self.column!r} holds chats, but {missing}; name a column of strings in "
            "data.prompt_column, a model with a chat template (most instruct models have one) in model.path, or a "
            "template in data.chat_template"
        )

    def _where(self, row: NumberedRow) -> str:
        return f"{self.source_name}, row {row.dataset_row} (from 0)"


def _nearest_name(wanted: str, names: Sequence[str]) -> str:
    close = close_match(wanted, names, cutoff=0.5)
    return f"Did you mean {close!r}? " if close else ""
