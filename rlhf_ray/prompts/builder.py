"""Dataset row -> ``Prompt``. The same code runs in the Ray Data workers and in the check before a run.

::

    row --_draft--> text, or chat and what its template writes --tokenizer, by the batch--> ids --_prompt--> Prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from rlhf_ray.config.settings import REWARD_ARGUMENTS, DataSettings
from rlhf_ray.config.user_code import close_match
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.rows import Row
from rlhf_ray.prompts.tokenizer import (
    read_chat_template,
    special_tokens_around,
    template_variables,
    text_flaw,
    with_special_tokens,
)
from rlhf_ray.types import ChatMessage, Prompt, PromptText
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Outcome", "Overlong", "PromptBuilder"]

# The column with a row's own arguments of the chat template, and the arguments that are not for the user to set.
_ARGUMENTS_COLUMN = "chat_template_kwargs"
_OWN_ARGUMENTS = frozenset({"messages", "add_generation_prompt"})

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """In place of a prompt that is dropped for its length."""

    num_tokens: int


Outcome: TypeAlias = Prompt | Overlong | DataError | ConfigError
"""What became of a row. Problems travel as values, so that each is raised when the stream reaches its row."""


class _Draft(NamedTuple):
    text: PromptText
    rendered: str
    """What is tokenized: the text, or the chat as its template writes it."""


class PromptBuilder:
    """How rows become prompts; small enough to travel to every worker.

    Args:
        settings: The ``data`` section, or a held-out set's own.
        source_name: What messages call the dataset.
        tokenizer_name: What messages call the tokenizer.
        max_prompt_tokens: Longest prompt in tokens.
        vocabulary_size: Rows of the model's embedding; ``None``: token ids are not compared with it.
        tools: Schemas of the tools that every prompt names.

    Raises:
        ConfigError: ``data.prompt_template`` has no place for the prompt, or ``data.chat_template`` is none.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        source_name: str,
        tokenizer_name: str,
        max_prompt_tokens: int,
        vocabulary_size: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        template = settings.prompt_template
        if template is not None and "{prompt}" not in template:
            raise ConfigError("data.prompt_template", template, "write {prompt} where the prompt goes")
        chat_template = read_chat_template(settings.chat_template)
        # Without the paths, which may be datasets.
        self.settings = replace(settings, path=None, eval_path=None, chat_template=chat_template)
        self.source_name = source_name
        self._tokenizer_name = tokenizer_name
        self.max_prompt_tokens = max_prompt_tokens
        self._vocabulary_size = vocabulary_size
        self._tools = [dict(schema) for schema in tools]

    def build(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        numbers: Sequence[int] | None = None,
        first_id: int = 0,
    ) -> list[Outcome]:
        """Turn rows into prompts, tokenized a batch at a time.

        Args:
            rows: ``[N]``.
            tokenizer: The model's.
            numbers: ``[N]`` indices in the dataset as stored, from 0, which messages name; ``None``: 0 to N - 1.
            first_id: The first prompt's id; the others count on from it.

        Returns:
            ``[N]``, in the same order: a prompt, or the error that says what is wrong with the row.
        """
        where = [self.where(number) for number in (range(len(rows)) if numbers is None else numbers)]
        drafts = [_attempt(at, self._draft, row, tokenizer) for at, row in zip(where, rows, strict=True)]
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        # A template writes the special tokens of a chat itself.
        strings = any(isinstance(draft.text, str) for draft in good)
        before = special_tokens_around(tokenizer)[0] if strings else []
        encoded = iter(_tokenized(tokenizer, [draft.rendered for draft in good]))
        return [
            _attempt(at, self._prompt, row, prompt_id, draft, next(encoded), before)
            if isinstance(draft, _Draft)
            else draft
            for prompt_id, (at, row, draft) in enumerate(zip(where, rows, drafts, strict=True), first_id)
        ]

    def none_fits(self, which: str, shortest: int) -> DataError:
        """Return the error for rows of which none fits, the shortest prompt having ``shortest`` tokens."""
        return DataError(
            f"{self.source_name}: {which} fits rollouts.max_prompt_tokens = {self.max_prompt_tokens}; the shortest "
            f"prompt has {shortest} tokens"
        )

    def where(self, dataset_row: int) -> str:
        """Return what messages call a row."""
        return f"{self.source_name}, row {dataset_row} (from 0)"

    def _prompt(
        self, row: Row, prompt_id: int, draft: _Draft, encoded: list[int] | Exception, before: list[int]
    ) -> Prompt | Overlong:
        if isinstance(encoded, Exception):
            raise DataError(f"the tokenizer refused the prompt: {shortened(encoded)}")
        token_ids = with_special_tokens(encoded, before) if isinstance(draft.text, str) else encoded
        if not token_ids:
            raise DataError("the prompt is empty; a prompt needs at least one token")
        if self._vocabulary_size is not None and max(token_ids) >= self._vocabulary_size:
            raise DataError(
                f"the prompt has token id {max(token_ids)}, and the model's embedding ends with "
                f"{self._vocabulary_size - 1}; name the model's own tokenizer in model.tokenizer_path, or a model with "
                f"an embedding for every token of {self._tokenizer_name}"
            )
        if len(token_ids) > self.max_prompt_tokens:
            if self.settings.overlong_prompts == "drop":
                return Overlong(num_tokens=len(token_ids))
            raise DataError(
                f"the prompt has {len(token_ids)} tokens, more than rollouts.max_prompt_tokens = "
                f"{self.max_prompt_tokens}; raise that, or set data.overlong_prompts to 'drop'"
            )
        return Prompt(
            prompt_id=prompt_id,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            text=draft.text,
            columns={name: value for name, value in row.items() if name != self.settings.prompt_column},
        )

    # --- row -> text ---------------------------------------------------------------------------------------------

    def _draft(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> _Draft:
        column = self.settings.prompt_column
        self._check_columns(row)
        value = row[column]
        if isinstance(value, str) and not self.settings.as_chat:
            self._check_string(row)
            text = self._templated(value)
            draft = _Draft(text, text)
        else:
            chat = self._chat(value)
            draft = _Draft(chat, self._rendered(chat, row, tokenizer))
        if flaw := text_flaw(draft.rendered):
            raise DataError(f"the prompt in column {column!r} {flaw}")
        return draft

    def _check_columns(self, row: Row) -> None:
        column = self.settings.prompt_column
        if column not in row:
            names = sorted(row)
            close = close_match(column, names, cutoff=0.5)
            hint = f"Did you mean {close!r}? " if close else ""
            known = ", ".join(map(repr, names))
            raise DataError(f"there is no column {column!r}; there is {known}. {hint}Set data.prompt_column")
        if clashes := sorted((REWARD_ARGUMENTS & row.keys()) - {column}):
            raise DataError(
                f"reward functions receive something else under the name {clashes[0]!r}, so no column can be called "
                "that; rename it"
            )

    def _check_string(self, row: Row) -> None:
        if self._tools:
            names = [schema["function"]["name"] for schema in self._tools]
            remedy = f"tools need chats, and column {self.settings.prompt_column!r} holds strings; set data.as_chat"
            raise ConfigError("environment.tools", names, remedy)
        for name in ("system_prompt", "chat_template", "chat_template_kwargs"):
            if given := getattr(self.settings, name):
                remedy = (
                    f"it is for chats alone, and column {self.settings.prompt_column!r} holds strings; set "
                    "data.as_chat to wrap them, or leave it out (data.prompt_template goes around strings)"
                )
                raise ConfigError(f"data.{name}", given, remedy)
        if row.get(_ARGUMENTS_COLUMN) is not None:
            raise DataError(
                f"column {_ARGUMENTS_COLUMN!r} holds arguments of a chat template, and the prompt is a string; set "
                "data.as_chat to wrap it, or rename the column"
            )

    def _templated(self, value: str) -> str:
        # replace() and not format(): a template may hold other braces, as in \boxed{}.
        template = self.settings.prompt_template
        return value if template is None else template.replace("{prompt}", value)

    def _chat(self, value: Any) -> list[ChatMessage]:
        column, system_prompt = self.settings.prompt_column, self.settings.system_prompt
        if isinstance(value, str):
            messages: list[ChatMessage] = [{"role": "user", "content": self._templated(value)}]
        elif not isinstance(value, (list, tuple, np.ndarray)):
            kind = "null" if value is None else f"of type {type(value).__name__}"
            raise DataError(
                f"the prompt in column {column!r} is {kind}; it must be a string or a chat list like "
                '[{"role": "user", "content": "..."}]'
            )
        elif self.settings.prompt_template is not None:
            remedy = f"a template goes around strings, and column {column!r} holds chats; leave it out"
            raise ConfigError("data.prompt_template", self.settings.prompt_template, remedy)
        else:
            messages = self._without_answer([_message(message) for message in value])
            if system_prompt is not None and messages and messages[0]["role"] == "system":
                remedy = "the chat begins with a system message of its own; leave data.system_prompt out"
                raise ConfigError("data.system_prompt", system_prompt, remedy)
        return messages if system_prompt is None else [{"role": "system", "content": system_prompt}, *messages]

    def _without_answer(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        if self.settings.final_assistant != "drop" or not messages:
            return messages
        last = max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=None)
        if last is None:
            raise DataError("the chat holds assistant messages alone, so none is left to answer")
        return messages[: last + 1]

    # --- chat -> text --------------------------------------------------------------------------------------------

    def _rendered(self, chat: list[ChatMessage], row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
        arguments = self._template_arguments(row, tokenizer)
        continued = bool(chat) and chat[-1]["role"] == "assistant"
        if continued and chat[-1].get("tool_calls"):
            raise DataError(
                "the chat ends in calls of tools, which a completion cannot continue; set data.final_assistant to "
                "'drop'"
            )
        try:
            rendered: str = tokenizer.apply_chat_template(
                chat,
                chat_template=self.settings.chat_template,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                tokenize=False,
                **arguments,
            )
        # A template is a program that came with the model: it may raise anything.
        except Exception as failure:
            whose = "data.chat_template" if self.settings.chat_template else "the tokenizer's chat template"
            raise DataError(f"{whose} refused the prompt: {shortened(failure)}") from failure
        return rendered

    def _template_arguments(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
        column, of_run = self.settings.prompt_column, self.settings.chat_template_kwargs
        if tokenizer.chat_template is None and self.settings.chat_template is None:
            missing = f"the tokenizer at {self._tokenizer_name} has no chat template"
            if isinstance(row[column], str):
                raise ConfigError(
                    "data.as_chat", True, f"{missing}; leave data.as_chat out, or give data.chat_template"
                )
            raise DataError(
                f"column {column!r} holds chats, but {missing}; name a column of strings in data.prompt_column, a "
                "model with a chat template (most instruct models have one) in model.path, or a template in "
                "data.chat_template"
            )
        own = row.get(_ARGUMENTS_COLUMN) if column != _ARGUMENTS_COLUMN else None
        if own is not None and not isinstance(own, Mapping):
            raise DataError(f"{_ARGUMENTS_COLUMN!r} is {shortened(repr(own), 80)}, not a mapping of arguments")
        of_tools = {"tools": self._tools} if self._tools else {}
        arguments = {**of_tools, **of_run, **(own or {})}
        if arguments:
            template = tokenizer.get_chat_template(self.settings.chat_template, tools=arguments.get("tools"))
            known = template_variables(template) - _OWN_ARGUMENTS
            for name in arguments.keys() - known:
                remedy = f"the chat template does not read {name!r}; it reads {', '.join(sorted(known))}"
                if own and name in own:
                    raise DataError(f"in column {_ARGUMENTS_COLUMN!r}, {remedy}")
                raise ConfigError("data.chat_template_kwargs", dict(of_run), remedy)
        return arguments


def _attempt(where: str, make: Callable[..., Made], *given: Any) -> Made | DataError | ConfigError:
    """Call a function; what it raises is returned, with the row that it is about."""
    try:
        return make(*given)
    except DataError as problem:
        return DataError(f"{where}: {problem}")
    except ConfigError as problem:
        return ConfigError(problem.field, problem.value, f"{where}: {problem.remedy}")


def _message(message: Any) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise DataError(f"a chat message is {shortened(repr(message))}; it must hold 'role' and 'content'")
    # As OpenAI writes the calls of tools; templates take a null for something that is there.
    content = {"content": ""} if message.get("tool_calls") and message.get("content") is None else {}
    given = {key: value for key, value in message.items() if value is not None} | content
    for key in ("role", "content"):
        if not isinstance(given.get(key), str):
            raise DataError(f"{key!r} of a chat message is {shortened(repr(given.get(key)))}, not a string")
    return given


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int] | Exception]:
    """Token ids without special tokens; where the tokenizer refuses a text, its error in their place."""
    try:
        # verbose=False: a prompt beyond the model's length is dropped or refused by the stream, which says so.
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []
    # What a tokenizer raises is its own affair; it must fall on the text that it is about, not on the batch.
    except Exception as failure:
        return [failure] if len(texts) == 1 else [ids for text in texts for ids in _tokenized(tokenizer, [text])]
