import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts import PromptStream
from rlhf_ray.quickstart import task
from rlhf_ray.types import Prompt, PromptPosition

pytestmark = pytest.mark.usefixtures("local_ray", "short_runs")

NUM_ROWS = 20

MakeStream = Callable[..., PromptStream]


@pytest.fixture
def make_stream(tokenizer_path: str, write_jsonl: Any) -> MakeStream:
    """Return a function that makes a stream over 20 short prompts, or over what ``path`` names."""
    rows = write_jsonl(({"prompt": f"p{i}", "row": i} for i in range(NUM_ROWS)), "rows.jsonl")

    def make(
        *,
        seed: int = 0,
        max_prompt_tokens: int = 8,
        epochs: int | None = None,
        field: str = "data.path",
        **settings: Any,
    ) -> PromptStream:
        return PromptStream(
            DataSettings(**{"path": rows, **settings}),
            tokenizer_path=tokenizer_path,
            max_prompt_tokens=max_prompt_tokens,
            seed=seed,
            epochs=epochs,
            field=field,
        )

    return make


def take(stream: PromptStream, count: int) -> list[Prompt]:
    return list(itertools.islice(stream, count))


def rows(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.columns["row"] for prompt in prompts]


def ids(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.prompt_id for prompt in prompts]


def test_unshuffled_rows_come_in_order_over_epochs(make_stream: MakeStream) -> None:
    prompts = take(make_stream(shuffle=False), 65)
    assert rows(prompts) == [i % NUM_ROWS for i in range(65)]
    assert ids(prompts) == list(range(65))
    assert [prompt.text for prompt in prompts[:3]] == ["p0", "p1", "p2"]
    assert all(prompt.token_ids.dtype == np.int32 for prompt in prompts)


def test_every_epoch_has_an_order_of_its_own_and_the_seed_decides_it(make_stream: MakeStream) -> None:
    first, same, other = (take(make_stream(seed=seed), 60) for seed in (3, 3, 4))
    epochs = [rows(first[start : start + NUM_ROWS]) for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert rows(first) == rows(same)
    assert rows(first) != rows(other)
    assert ids(first) == list(range(60))


@pytest.mark.parametrize("seen", [0, 7, 19, 20, 53])
def test_a_restored_stream_goes_on_exactly(make_stream: MakeStream, seen: int) -> None:
    whole = make_stream(seed=1)
    before = take(whole, seen)
    assert len(before) == seen
    position = whole.state()
    assert position == PromptPosition(epoch=seen // NUM_ROWS, row=seen % NUM_ROWS)
    restored = make_stream(seed=1)
    restored.restore(position)
    assert restored.state() == position
    expected, actual = take(whole, 45), take(restored, 45)
    assert ids(actual) == ids(expected) == list(range(seen, seen + 45))
    assert rows(actual) == rows(expected)
    assert restored.state() == whole.state()


def test_a_running_stream_can_be_sent_back(make_stream: MakeStream) -> None:
    stream = make_stream()
    first = take(stream, 10)
    stream.restore(PromptPosition(epoch=0, row=4))
    assert rows(take(stream, 6)) == rows(first[4:])


@pytest.mark.parametrize("unfinished", [(3,), (0, 1, 2), (5, 19, 22), (2, 24)])
def test_unfinished_prompts_come_first(make_stream: MakeStream, unfinished: tuple[int, ...]) -> None:
    whole = make_stream(seed=1)
    before = take(whole, 25)
    restored = make_stream(seed=1)
    restored.restore(replace(whole.state(), unfinished=unfinished))

    first = next(restored)
    assert restored.state() == replace(whole.state(), unfinished=unfinished[1:])
    prompts = [first, *take(restored, len(unfinished) - 1 + 30)]

    assert ids(prompts) == [*unfinished, *range(25, 55)]
    assert rows(prompts) == rows([before[number] for number in unfinished] + take(whole, 30))
    assert restored.state() == whole.state()


def test_closing_keeps_the_position(make_stream: MakeStream) -> None:
    stream, whole = make_stream(), make_stream()
    before = take(stream, 5)
    stream.close()
    assert rows(before + take(stream, 5)) == rows(take(whole, 10))


def test_a_position_that_the_dataset_does_not_have(make_stream: MakeStream) -> None:
    stream = make_stream()
    stream.restore(PromptPosition(epoch=1, row=NUM_ROWS))
    with pytest.raises(DataError, match=r"rows\.jsonl has 20 rows, so a run over it cannot be at epoch 1, row 20"):
        next(stream)
    stream.restore(PromptPosition(epoch=1, row=0))
    stream.open()
    with pytest.raises(DataError, match="cannot be at epoch 0, row 21"):
        stream.restore(PromptPosition(epoch=0, row=21))


def long_every_fifth(write_jsonl: Any) -> str:
    return str(write_jsonl({"prompt": "x" * 9 if i % 5 == 0 else f"p{i}", "row": i} for i in range(NUM_ROWS)))


def test_dropped_prompts_are_counted_and_keep_their_ids(make_stream: MakeStream, write_jsonl: Any) -> None:
    stream = make_stream(path=long_every_fifth(write_jsonl), shuffle=False)
    prompts = take(stream, 17)
    assert ids(prompts) == [i for i in range(22) if i % 5 != 0]
    assert rows(prompts) == [i % NUM_ROWS for i in range(22) if i % 5 != 0]
    assert stream.dropped == 5
    assert stream.num_rows == NUM_ROWS


def test_dropped_prompts_count_in_the_position(make_stream: MakeStream, write_jsonl: Any) -> None:
    path = long_every_fifth(write_jsonl)
    whole = make_stream(path=path, seed=2)
    take(whole, 13)
    restored = make_stream(path=path, seed=2)
    restored.restore(whole.state())
    assert ids(take(restored, 30)) == ids(take(whole, 30))


def test_an_overlong_prompt_as_an_error(make_stream: MakeStream, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "p0"}, {"prompt": "p1"}, {"prompt": "x" * 9}])
    stream = make_stream(path=path, shuffle=False, overlong_prompts="error")
    assert len(take(stream, 2)) == 2
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.jsonl, row 2 \(from 0\): the prompt has 9 tokens"):
            next(stream)
    assert stream.state() == PromptPosition(epoch=0, row=2)


def test_an_epoch_without_a_prompt_that_fits_is_an_error_and_not_a_hang(make_stream: MakeStream) -> None:
    stream = make_stream(max_prompt_tokens=1)
    with pytest.raises(DataError, match=r"none of its 20 rows fits rollouts\.max_prompt_tokens = 1; .* has 2 tokens"):
        next(stream)


def test_a_bad_row_is_an_error_when_the_stream_gets_there(make_stream: MakeStream, write_jsonl: Any) -> None:
    stream = make_stream(path=write_jsonl([{"prompt": "a"}, {"prompt": None}]), shuffle=False)
    assert next(stream).text == "a"
    with pytest.raises(DataError, match=r"row 1 \(from 0\): the prompt in column 'prompt' is null"):
        next(stream)


def test_chats_with_nested_columns(make_stream: MakeStream, write_jsonl: Any) -> None:
    chat = [{"role": "user", "content": "1+1?"}]
    columns = {"tests": [{"input": "a", "output": None}, {"input": 3}], "meta": {"tags": ["x"], "level": 2}}
    stream = make_stream(
        path=write_jsonl([{"chat": chat, **columns}]),
        prompt_column="chat",
        system_prompt="Be brief.",
        max_prompt_tokens=100,
    )
    prompt = next(stream)
    assert prompt.text == [{"role": "system", "content": "Be brief."}, *chat]
    assert prompt.columns == columns
    expected = "<system>Be brief.</s><user>1+1?</s><assistant>"
    assert len(prompt.token_ids) == len(expected) - 2 * len("</s>") + 2


def test_a_ray_dataset(make_stream: MakeStream) -> None:
    import ray.data

    dataset = ray.data.range(12).map(lambda row: {"prompt": f"n{row['id']}", "row": row["id"]})
    stream = make_stream(path=dataset, shuffle=False)
    stream.check()
    assert [prompt.text for prompt in take(stream, 14)] == [f"n{i % 12}" for i in range(14)]


def test_an_empty_dataset(make_stream: MakeStream, write_jsonl: Any) -> None:
    stream = make_stream(path=write_jsonl([]))
    for use in (stream.check, stream.open, lambda: next(stream)):
        with pytest.raises(DataError, match=r"data\.jsonl is empty: it has no rows"):
            use()


def test_an_empty_ray_dataset(make_stream: MakeStream) -> None:
    import ray.data

    stream = make_stream(path=ray.data.range(5).filter(lambda row: False))
    for use in (stream.check, stream.open):
        with pytest.raises(DataError, match=r"the ray\.data\.Dataset in data\.path is empty"):
            use()


def test_a_check_finds_what_is_wrong(make_stream: MakeStream, write_jsonl: Any) -> None:
    make_stream().check()
    with pytest.raises(DataError, match=r"no column 'promt'; there is 'prompt', 'row'\. Did you mean 'prompt'\?"):
        make_stream(prompt_column="promt").check()
    with pytest.raises(ConfigError, match=r"data\.system_prompt = 'Be brief\.'"):
        make_stream(system_prompt="Be brief.").check()


def test_a_check_of_files_needs_no_ray_tasks_and_a_second(make_stream: MakeStream, write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": f"How much is {i} and {i}?", "row": i} for i in range(5000))
    stream = make_stream(path=path, max_prompt_tokens=100)
    stream.check()  # the first one imports
    start = time.process_time()
    stream.check()
    assert time.process_time() - start < 1.0


def test_the_next_epoch_starts_at_once(make_stream: MakeStream) -> None:
    stream = make_stream()
    take(stream, NUM_ROWS)
    times = []
    for _ in range(5 * NUM_ROWS):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.01


# Held-out sets: read once, in order.


@pytest.fixture
def make_held_out(make_stream: MakeStream) -> MakeStream:
    return partial(make_stream, epochs=1, shuffle=False, field="data.eval_path.easy")


def test_a_stream_of_one_epoch_ends(make_held_out: MakeStream) -> None:
    stream = make_held_out()
    assert ids(list(stream)) == list(range(NUM_ROWS))
    assert list(stream) == []
    assert stream.state() == PromptPosition(epoch=1, row=0)


def test_a_held_out_set_can_be_read_again(make_held_out: MakeStream) -> None:
    stream = make_held_out()
    for _ in range(2):
        prompts = stream.read_all()
        assert ids(prompts) == rows(prompts) == list(range(NUM_ROWS))
        assert [prompt.text for prompt in prompts] == [f"p{i}" for i in range(NUM_ROWS)]


def test_a_limit_counts_prompts_that_fit(
    make_held_out: MakeStream, write_jsonl: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl({"prompt": "too long to be used" if i == 1 else f"p{i}"} for i in range(6))
    with caplog.at_level(logging.WARNING, "rlhf_ray"):
        prompts = make_held_out(path=path).read_all(limit=3)
    assert [prompt.text for prompt in prompts] == ["p0", "p2", "p3"]
    assert "data.jsonl: 1 prompts longer than 8 tokens were left out" in caplog.text


def test_no_data_named_is_the_quickstart_task(make_held_out: MakeStream) -> None:
    prompts = make_held_out(path=None).read_all()
    assert [{"prompt": prompt.text, **prompt.columns} for prompt in prompts] == task.eval_rows()


def test_the_same_checks_as_of_training_data(make_held_out: MakeStream, write_jsonl: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_path\.easy = 5"):
        make_held_out(path=5)
    with pytest.raises(DataError, match=r"data\.eval_path\.easy: no such file"):
        make_held_out(path="missing.jsonl")
    for find in (PromptStream.read_all, PromptStream.check):
        with pytest.raises(DataError, match="is empty"):
            find(make_held_out(path=write_jsonl([])))
        with pytest.raises(DataError, match="there is no column 'prompt'"):
            find(make_held_out(path=write_jsonl([{"question": "a"}])))
    make_held_out(path=write_jsonl([{"prompt": "a"}])).check()


def test_a_bad_row_that_the_check_did_not_reach(make_held_out: MakeStream, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "a"}] * 1000 + [{"prompt": None}])
    with pytest.raises(DataError, match=r"data\.jsonl, row 1000 \(from 0\): the prompt in column 'prompt' is null"):
        make_held_out(path=path).read_all()
