from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out

CPU = torch.device("cpu")


def batch_of(*sequences: tuple[list[int], list[int]]) -> SequenceBatch:
    """Sequences given as prompt and completion ids."""
    completions = [completion for _, completion in sequences]
    return SequenceBatch.single_turn(
        token_ids=np.asarray([t for prompt, completion in sequences for t in prompt + completion], dtype=np.int32),
        prompt_lengths=np.asarray([len(prompt) for prompt, _ in sequences], dtype=np.int32),
        completion_lengths=np.asarray([len(completion) for completion in completions], dtype=np.int32),
    )


THREE = batch_of(([10, 11, 12], [13, 14]), ([20], [21, 22, 23]), ([30, 31], [32]))


def completion_tokens(micro: Microbatch) -> list[list[int]]:
    """Read the completions back through the targets, as log-probabilities are."""
    tokens = micro.targets.new_zeros(micro.mask.numel()).scatter(0, micro.scored, micro.targets).view(micro.mask.shape)
    return [row[real].tolist() for row, real in zip(tokens, micro.mask, strict=True)]


def states_before(micro: Microbatch) -> list[list[int]]:
    """The token at each state that a completion token's value is read from."""
    rows = micro.input_ids.flatten()[micro.value_index]
    return [row[real].tolist() for row, real in zip(rows, micro.mask, strict=True)]


def test_padded_by_hand() -> None:
    micro = lay_out(THREE, (0, 1, 2), packed=False, device=CPU)

    assert micro.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 23, 0], [30, 31, 32, 0, 0]]
    assert micro.position_ids is None
    assert micro.cu_seq_lens is None
    assert micro.model_inputs() == {"input_ids": micro.input_ids, "use_cache": False}
    assert micro.max_length == 5
    # The first completion token that anybody has is at column 1, so logits are needed from column 0 on.
    assert micro.kept.tolist() == [0, 1, 2, 3]
    assert micro.targets.tolist() == [13, 14, 21, 22, 23, 32]
    assert micro.mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert micro.value_index[micro.mask].tolist() == [2, 3, 5, 6, 7, 11]
    assert micro.last_index.tolist() == [4, 8, 12]


def test_packed_by_hand() -> None:
    micro = lay_out(THREE, (0, 1, 2), packed=True, device=CPU)

    assert micro.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23, 30, 31, 32]]
    assert micro.position_ids is not None
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert micro.cu_seq_lens is not None
    assert micro.cu_seq_lens.dtype == torch.int32
    assert micro.cu_seq_lens.tolist() == [0, 5, 9, 12]
    inputs = micro.model_inputs()
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (5, 5)
    assert inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is micro.cu_seq_lens
    assert inputs["position_ids"] is micro.position_ids
    assert micro.kept.tolist() == [2, 3, 5, 6, 7, 10]
    assert micro.targets.tolist() == [13, 14, 21, 22, 23, 32]
    assert micro.value_index[micro.mask].tolist() == [2, 3, 5, 6, 7, 10]
    assert micro.last_index.tolist() == [4, 8, 11]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0), (1,), (2,)])
def test_both_layouts_read_the_same_tokens_and_states(packed: bool, rows: Sequence[int]) -> None:
    micro = lay_out(THREE, rows, packed=packed, device=CPU)

    assert completion_tokens(micro) == [[[13, 14], [21, 22, 23], [32]][row] for row in rows]
    assert states_before(micro) == [[[12, 13], [20, 21, 22], [31]][row] for row in rows]
    assert micro.input_ids.flatten()[micro.last_index].tolist() == [[14, 23, 32][row] for row in rows]
    assert micro.rows.tolist() == list(rows)
    # A state's target is what follows it.
    assert micro.input_ids.flatten()[micro.value_index + 1][micro.mask].tolist() == micro.targets.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_are_left_out_are_read_by_the_model_alone(packed: bool) -> None:
    batch = replace(THREE, loss_mask=np.asarray([0, 1, 0, 0, 1, 0], dtype=np.bool_))

    micro = lay_out(batch, (0, 1, 2), packed=packed, device=CPU)

    assert micro.input_ids.tolist() == lay_out(THREE, (0, 1, 2), packed=packed, device=CPU).input_ids.tolist()
    assert completion_tokens(micro) == [[14], [23], []]
    assert states_before(micro) == [[13], [22], []]
    assert micro.mask.tolist() == [[False, True, False], [False, False, True], [False, False, False]]
    assert micro.input_ids.flatten()[micro.last_index].tolist() == [14, 23, 32]


@pytest.mark.parametrize("packed", [False, True])
def test_what_the_mask_says_is_known_without_the_device(packed: bool) -> None:
    batch = replace(
        THREE,
        on_policy=np.asarray([True, False, True]),
        staleness=np.asarray([0, 0, 3, 1, 0, 0], dtype=np.int32),
        loss_mask=np.asarray([1, 1, 0, 1, 1, 1], dtype=np.bool_),
    )

    micro = lay_out(batch, (0, 1, 2), packed=packed, device=CPU)

    assert micro.scored.tolist() == micro.mask.flatten().nonzero().flatten().tolist() == [0, 1, 4, 5, 6]
    assert micro.num_on_policy == 2 + 1
    assert micro.num_by_staleness == ((0, 4), (1, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_a_single_token_completion(packed: bool) -> None:
    micro = lay_out(batch_of(([5, 6, 7], [8])), (0,), packed=packed, device=CPU)

    assert micro.kept.tolist() == [2]
    assert completion_tokens(micro) == [[8]]
    assert states_before(micro) == [[7]]
    assert micro.last_index.tolist() == [3]


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_microbatch_is_a_dummy_of_two_tokens_that_counts_nowhere(packed: bool) -> None:
    micro = lay_out(THREE, (), packed=packed, device=CPU)

    assert micro.input_ids.shape == (1, 2)
    assert micro.kept.tolist() == [0]
    assert micro.mask.tolist() == [[False]]
    assert len(micro.rows) == len(micro.scored) == len(micro.targets) == micro.num_on_policy == 0
    assert micro.num_by_staleness == ()
    assert micro.value_index.tolist() == [[0]]
    if packed:
        assert micro.position_ids is not None
        assert micro.position_ids.tolist() == [[0, 1]]
        assert micro.cu_seq_lens is not None
        assert (micro.cu_seq_lens.tolist(), micro.max_length) == ([0, 2], 2)


@pytest.mark.parametrize("packed", [False, True])
def test_indices_at_padding_stay_in_range(packed: bool) -> None:
    micro = lay_out(THREE, (0, 1, 2), packed=packed, device=CPU)

    assert int(micro.value_index.max()) < micro.input_ids.numel()
    assert all(t.dtype == torch.int64 for t in (micro.input_ids, micro.targets, micro.kept, micro.value_index))


@pytest.mark.parametrize("packed", [False, True])
def test_observed_tokens_are_read_by_the_model_and_are_no_targets(packed: bool) -> None:
    """Of ``21 22 23`` the middle one was observed: the state before it is none whose value counts."""
    batch = replace(THREE, loss_mask=np.asarray([1, 1, 1, 0, 1, 1], dtype=np.bool_))

    micro = lay_out(batch, (0, 1, 2), packed=packed, device=CPU)

    assert micro.input_ids.tolist() == lay_out(THREE, (0, 1, 2), packed=packed, device=CPU).input_ids.tolist()
    assert completion_tokens(micro) == [[13, 14], [21, 23], [32]]
    assert states_before(micro) == [[12, 13], [20, 22], [31]]
    assert micro.scored.tolist() == [0, 1, 3, 5, 6]
