import pytest

from rlhf_ray.rollouts import replica as start_failure
from rlhf_ray.rollouts.replica import engine_failure, root_cause


def test_the_last_error_that_is_no_wrapper_is_the_cause() -> None:
    log = [
        "INFO starting",
        "(EngineCore pid=7) ERROR 11-22 18:26:34 [core.py:1510] ValueError: no such dtype: float7",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert root_cause(log) == "ValueError: no such dtype: float7"


def test_a_log_without_errors_has_no_cause() -> None:
    assert root_cause(["INFO all is well", "an Error without a colon"]) is None


def test_an_error_of_this_process_speaks_for_itself_in_one_line() -> None:
    error = ValueError("1 validation error for ModelConfig\n  quantization: 'no-such-thing'")
    assert engine_failure(error) == "ValueError: 1 validation error for ModelConfig quantization: 'no-such-thing'"


@pytest.mark.parametrize("in_log", [False, True])
def test_a_long_error_is_cut(monkeypatch: pytest.MonkeyPatch, in_log: bool) -> None:
    monkeypatch.setattr(start_failure, "_own_log", lambda: ["ERROR ValueError: " + "x" * 50_000])
    error = RuntimeError("Engine core proc died") if in_log else ValueError("x" * 50_000)
    message = engine_failure(error)
    assert message.startswith("ValueError: xxx")
    assert len(message) < 1100


def test_an_engine_that_died_is_explained_by_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = ["ERROR [core.py:1] torch.OutOfMemoryError: CUDA out of memory", "EngineDeadError: EngineCore encountered an"]
    monkeypatch.setattr(start_failure, "_own_log", lambda: log)

    class EngineDeadError(Exception):
        """As vLLM's."""

    error = EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    assert engine_failure(error) == "torch.OutOfMemoryError: CUDA out of memory"
