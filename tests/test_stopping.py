from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from rlhf_ray.stopping import stop_all


class Recorded:
    """Steps that write down that they were called, and raise what they are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self, name: str, error: BaseException | None = None) -> tuple[str, Callable[[], None]]:
        def stop() -> None:
            self.calls.append(name)
            if error is not None:
                raise error

        return name, stop


def test_every_step_is_called_in_order_whatever_the_others_raise(caplog: pytest.LogCaptureFixture) -> None:
    done = Recorded()
    with caplog.at_level(logging.WARNING):
        stop_all(done.step("a"), done.step("b", TimeoutError("60 s")), done.step("c", ValueError("x")), done.step("d"))
    assert done.calls == ["a", "b", "c", "d"]
    assert "b: stopping failed (TimeoutError('60 s')); it may be left behind" in caplog.text
    assert "c: stopping failed" in caplog.text


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_is_raised_when_all_are_stopped(interrupt: BaseException) -> None:
    done = Recorded()
    with pytest.raises(type(interrupt)) as caught:
        stop_all(done.step("a", interrupt), done.step("b", ValueError("x")), done.step("c", KeyboardInterrupt()))
    assert caught.value is interrupt
    assert done.calls == ["a", "b", "c"]


@pytest.mark.parametrize("later", [ValueError("left"), KeyboardInterrupt(), SystemExit(0)])
@pytest.mark.parametrize("cause", [ValueError("the cause"), KeyboardInterrupt("the cause")])
def test_the_error_that_led_to_the_stop_is_the_one_that_is_raised(cause: BaseException, later: BaseException) -> None:
    done = Recorded()
    with pytest.raises(type(cause), match="the cause"):
        try:
            raise cause
        except BaseException:
            stop_all(done.step("a", later), done.step("b"))
            raise
    with pytest.raises(type(cause), match="the cause"):
        try:
            raise cause
        finally:
            stop_all(done.step("c", later), done.step("d"))
    assert done.calls == ["a", "b", "c", "d"]


def test_steps_within_steps_are_all_called() -> None:
    done = Recorded()
    with pytest.raises(KeyboardInterrupt):
        stop_all(
            ("inner", lambda: stop_all(done.step("a", KeyboardInterrupt()), done.step("b"))),
            done.step("c"),
        )
    assert done.calls == ["a", "b", "c"]
