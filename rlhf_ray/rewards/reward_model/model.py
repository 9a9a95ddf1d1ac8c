"""A loaded reward model: prompts and completions -> texts -> batches with little padding -> scores."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.config import context_length
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.models.weights import caps_attention, compute_heads_in_float32, first_nonfinite
from rlhf_ray.prompts.tokenizer import special_tokens_around, with_special_tokens
from rlhf_ray.rewards.reward_model.check import label_index, reward_tokenizer
from rlhf_ray.rewards.reward_model.reward import RewardModelReward
from rlhf_ray.types import Float32Array, PromptText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RewardModel", "batches", "conversation", "model_of_this_process", "unused_token_id"]

_PROBE = "1 + 1 = 2"


class RewardModel:
    """A sequence-classification model and its tokenizer.

    The score of a sequence does not depend on what it is batched with: padding is on the right, is masked, and is never
    taken for the token that the score is read from.

    Args:
        reward: What to load.
        device: Where: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: It cannot be loaded, has no head, or gives no finite score.
    """

    def __init__(self, reward: RewardModelReward, *, device: str = "cpu") -> None:
        self._reward = reward
        self._device = device
        self._tokenizer = reward_tokenizer(reward, "reward_model")
        self._chat = self._tokenizer.chat_template is not None if reward.as_chat is None else reward.as_chat
        self._special_tokens = special_tokens_around(self._tokenizer)
        self._model = _load(reward, device).to(device).eval()
        self._label = label_index(self._model.config, reward, "reward_model")
        self._max_length = reward.max_length or context_length(self._model.config)
        self._check_finite()

    def encoded(self, prompts: Sequence[PromptText], completions: Sequence[str]) -> list[list[int]]:
        """``[N]`` sequences of token ids, as long as ``max_length`` at most.

        Raises:
            DataError: A sequence is empty or too long, or a chat cannot be written.
        """
        texts = [
            conversation(prompt, completion, self._tokenizer, chat=self._chat)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        # A template writes the special tokens of a chat itself.
        before, after = ([], []) if self._chat else self._special_tokens
        bare = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self._fitting(with_special_tokens(ids, before, after)) for ids in bare]

    def scores(self, sequences: Sequence[Sequence[int]]) -> Float32Array:
        """``[N]`` logits of the label, for ``[N]`` sequences of token ids."""
        values = np.empty(len(sequences), dtype=np.float32)
        for batch in batches([len(sequence) for sequence in sequences], self._reward.max_tokens_per_batch):
            self._score([sequences[index] for index in batch], batch, values)
        return values

    def _score(self, sequences: Sequence[Sequence[int]], places: Sequence[int], values: Float32Array) -> None:
        own_pad_id = self._text_config.pad_token_id
        pad_id = own_pad_id
        if own_pad_id is None:
            # Models read the score off the last token that is not the pad token. Where a model has none, any id would
            # do that no sequence ends with; without one, sequences are scored one at a time.
            pad_id = unused_token_id(sequences, self._text_config.vocab_size)
            if pad_id is None and len(sequences) > 1:
                for sequence, place in zip(sequences, places, strict=True):
                    self._score([sequence], [place], values)
                return
        self._text_config.pad_token_id = pad_id
        try:
            values[list(places)] = self._logits(sequences, fill=pad_id or 0)
        finally:
            self._text_config.pad_token_id = own_pad_id

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _logits(self, sequences: Sequence[Sequence[int]], *, fill: int) -> Float32Array:
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), longest), fill)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        output = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device))
        logits: Float32Array = output.logits[:, self._label].float().cpu().numpy()
        return logits

    @property
    def _text_config(self) -> Any:
        return self._model.config.get_text_config()

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise DataError("the reward model got an empty prompt with an empty completion")
        limit = self._max_length
        if limit is None or len(ids) <= limit:
            return ids
        if self._reward.overlong == "error":
            raise DataError(
                f"a sequence of {len(ids)} tokens is longer than the reward model takes ({limit}): set overlong to "
                "truncate_left, or lower rollouts.max_new_tokens or rollouts.max_prompt_tokens"
            )
        return ids[-limit:]

    def _check_finite(self) -> None:
        score = self.scores(self._tokenizer([_PROBE])["input_ids"])[0]
        if not np.isfinite(score):
            remedy = f"it scores {_PROBE!r} as {score}: its weights are damaged, or dtype is too narrow for it"
            raise ConfigError("reward_model.path", self._reward.path, remedy)


def conversation(prompt: PromptText, completion: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """One text.

    Args:
        prompt: A string, which is a user's message where chats are written, or a chat list.
        completion: The assistant's answer, or the rest of it where the prompt ends in its beginning.
        tokenizer: The reward model's.
        chat: Write it with the tokenizer's template, which then adds special tokens itself.

    Raises:
        DataError: The prompt is a chat and no template is used.
    """
    if not chat:
        if isinstance(prompt, str):
            return prompt + completion
        raise DataError(
            "the prompt is a chat, and the reward model's tokenizer has no chat template (or as_chat is off): name one "
            "that has it in tokenizer_path, or give string prompts"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = {"role": "assistant", "content": completion}
    if messages and messages[-1]["role"] == "assistant":  # The completion continues it: one message, not two.
        *messages, begun = messages
        answer = {**begun, "content": begun["content"] + completion}
    text: str = tokenizer.apply_chat_template([*messages, answer], tokenize=False, add_generation_prompt=False)
    return text


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of each batch, longest sequences first.

    A batch of ``n`` sequences of at most ``T`` tokens costs ``n * T`` tokens, padding included; that is at most
    ``max_tokens``, except for a single sequence that is longer.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def unused_token_id(sequences: Sequence[Sequence[int]], vocab_size: int) -> int | None:
    """The smallest id that is in no sequence; ``None`` where all are."""
    used = {token for sequence in sequences for token in sequence}
    return next((token for token in range(vocab_size) if token not in used), None)


@functools.cache
def model_of_this_process(reward: RewardModelReward) -> RewardModel:
    """Load a model once."""
    return RewardModel(reward, device="cuda" if reward.num_gpus and torch.cuda.is_available() else "cpu")


def _load(reward: RewardModelReward, device: str) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    dtype = reward.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        with hub_lookup(reward.path):
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                reward.path,
                dtype=getattr(torch, dtype),
                trust_remote_code=reward.trust_remote_code,
                output_loading_info=True,
            )
    # A damaged file, an unknown class and an unreachable hub each have a type of their own.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        remedy = f"the model cannot be loaded ({type(error).__name__}: {reason})"
        raise ConfigError("reward_model.path", reward.path, remedy) from error
    # transformers would continue with random numbers in place of what the files lack.
    if absent := sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}):
        remedy = f"the folder lacks weights of a trained reward model ({', '.join(absent[:3])}); name one that has them"
        raise ConfigError("reward_model.path", reward.path, remedy)
    if damaged := first_nonfinite(model.state_dict().items()):
        remedy = f"its {damaged} is not finite: the file is damaged, or dtype is too narrow for it"
        raise ConfigError("reward_model.path", reward.path, remedy)
    if model.config._attn_implementation == "sdpa" and caps_attention(model):
        model.set_attn_implementation("eager")
    compute_heads_in_float32(model)
    return model
