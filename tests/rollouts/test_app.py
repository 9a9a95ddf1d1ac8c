"""How the rollout application begins and ends, with a recorded Serve."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from rlhf_ray.errors import LearnerError, RolloutError
from rlhf_ray.rollouts import app as serve_instance
from rlhf_ray.rollouts.app import RolloutApp


class FakeServe:
    """One Serve instance of a cluster; complains where it is started twice or ended under an application."""

    def __init__(self) -> None:
        self.number = 0
        self.running = False
        self.applications: dict[str, Any] = {}
        self.shutdowns = 0
        self.error: Exception | None = None
        self.status: ApplicationStatus | None = None
        self.deleted: list[str] = []
        self._busy = threading.Lock()

    def get_actor(self, name: str, namespace: str) -> Any:
        if not self.running:
            raise ValueError(name)
        return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: f"serve {self.number}"))

    def start(self, **_: Any) -> None:
        self._alone()
        if not self.running:
            self.running, self.number = True, self.number + 1

    def deployment(self) -> Any:
        self._alone()
        return SimpleNamespace(bind=lambda *_: None)

    def _alone(self) -> None:
        assert self._busy.acquire(blocking=False), "two threads use Serve at once"
        time.sleep(0.01)
        self._busy.release()

    def run_many(self, targets: list[Any], **_: Any) -> list[Any]:
        assert self.running, "Serve ended under a deployment"
        self.applications[targets[0].name] = None
        return ["handle"]

    def delete(self, name: str) -> None:
        if self.error is not None:
            raise self.error
        self.deleted.append(name)
        self.applications.pop(name, None)

    def statuses(self) -> dict[str, Any]:
        application = SimpleNamespace(status=self.status, deployments={}, message="")
        return dict.fromkeys(self.applications, application)

    def shutdown(self) -> None:
        assert not self.applications
        self.running = False
        self.shutdowns += 1


@pytest.fixture
def fake_serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    for name in ("start", "run_many", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, getattr(fake, name))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=fake.statuses()))
    monkeypatch.setattr(ray, "get_actor", fake.get_actor)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serve_instance, "_started", None)
    monkeypatch.setattr(RolloutApp, "_deployment", lambda self: fake.deployment())
    return fake


def new_app(name: str, **options: Any) -> RolloutApp:
    spec: Any = None
    options = {"startup_timeout_s": 1.0, "ray_ends": False, **options}
    return RolloutApp(run_id=name, spec=spec, num_replicas=1, num_cpus=1.0, bridge=None, **options)


@pytest.fixture
def app_of(fake_serve: FakeServe) -> Callable[..., RolloutApp]:
    def make(name: str, *, ray_ends: bool = False) -> RolloutApp:
        app = new_app(name, ray_ends=ray_ends)
        app.start()
        assert app._deploying is not None
        app._deploying.result(5)
        return app

    return make


def test_replicas_are_deployed_after_what_comes_first(fake_serve: FakeServe) -> None:
    app = new_app("a", startup_timeout_s=0.1)
    placed = threading.Event()
    fake_serve.status = ApplicationStatus.RUNNING
    app.start(after=lambda stopped: assert_true(placed.wait(5)))
    with ThreadPoolExecutor(1) as thread:
        ready = thread.submit(app.wait_ready)
        # Longer than the replicas' own time, which begins with them.
        time.sleep(0.3)
        assert (ready.done(), fake_serve.running, fake_serve.applications) == (False, False, {})
        placed.set()
        assert ready.result(5) == "handle"
    app.stop()


def test_what_comes_first_and_fails_is_the_error_of_the_replicas_too(fake_serve: FakeServe) -> None:
    app = new_app("a")

    def fail(stopped: threading.Event) -> None:
        raise LearnerError("no room for the learners")

    app.start(after=fail)
    with pytest.raises(LearnerError, match="no room for the learners"):
        app.wait_ready()
    app.stop()
    assert (fake_serve.number, fake_serve.deleted) == (0, [])


def test_replicas_that_wait_for_the_learners_are_stopped_at_once(fake_serve: FakeServe) -> None:
    fake_serve.start()  # Of another application.
    app = new_app("a")
    app.start(after=lambda stopped: assert_true(stopped.wait(30)))
    started = time.monotonic()
    app.stop()
    assert time.monotonic() - started < 5
    with pytest.raises(RolloutError, match="stopped before they were ready"):
        app.wait_ready()
    assert (fake_serve.applications, fake_serve.deleted) == ({}, [])


def assert_true(value: bool) -> None:
    assert value


def test_the_last_application_ends_the_serve_that_this_process_started(
    app_of: Callable[..., RolloutApp], fake_serve: FakeServe
) -> None:
    first, second = app_of("a"), app_of("b")
    first.stop()
    assert (fake_serve.running, set(fake_serve.applications)) == (True, {"b-rollout"})
    second.stop()
    second.stop()
    assert (fake_serve.running, fake_serve.shutdowns) == (False, 1)


def test_a_serve_that_was_there_stays(app_of: Callable[..., RolloutApp], fake_serve: FakeServe) -> None:
    app_of("a")  # Of a cluster that is gone.
    fake_serve.applications.clear()
    fake_serve.number += 1
    app_of("b").stop()
    assert fake_serve.running


def test_a_serve_that_ends_with_its_cluster_is_left_to_that(
    app_of: Callable[..., RolloutApp], fake_serve: FakeServe
) -> None:
    app_of("a", ray_ends=True).stop()
    assert (fake_serve.applications, fake_serve.shutdowns) == ({}, 0)


def test_an_application_that_is_not_deleted_in_time_is_told_and_no_error(
    app_of: Callable[..., RolloutApp], fake_serve: FakeServe, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of("a")
    fake_serve.error = TimeoutError("Some of these applications weren't deleted after 60s")
    with caplog.at_level(logging.WARNING):
        app.stop()
    assert "Serve application a-rollout: stopping failed (TimeoutError" in caplog.text
    assert fake_serve.running


def test_applications_in_threads_share_one_serve(app_of: Callable[..., RolloutApp], fake_serve: FakeServe) -> None:
    failures: list[BaseException] = []

    def come_and_go(name: str) -> None:
        try:
            for _ in range(5):
                app_of(name).stop()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"run-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (fake_serve.running, fake_serve.applications) == (False, {})
    for thread in threading.enumerate():
        if thread.name.startswith("rollout-app"):
            thread.join(5)
            assert not thread.is_alive()


def test_no_status_is_asked_of_a_serve_that_is_being_ended(
    app_of: Callable[..., RolloutApp], fake_serve: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, ended = threading.Event(), threading.Event()

    def status() -> Any:
        asking.set()
        assert not ended.wait(0.05), "an answer that never comes"
        return SimpleNamespace(applications={})

    app = app_of("a", ray_ends=True)
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve, "delete", lambda name: ended.set())
    with ThreadPoolExecutor(1) as thread:
        ready = thread.submit(app.wait_ready)
        assert asking.wait(5)
        app.stop()
        assert ended.is_set()
        with pytest.raises(RolloutError, match="stopped before they were ready"):
            ready.result(5)
