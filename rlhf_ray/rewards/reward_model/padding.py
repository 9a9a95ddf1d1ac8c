"""Rewards, in front of a reward model: sequences of many lengths -> batches with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["batches", "unused_token_id"]


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of each batch, longest sequences first.

    A batch of ``n`` sequences of at most ``T`` tokens costs ``n * T`` tokens, padding included; that is at most
    ``max_tokens``, but for a sequence that is longer alone.
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
