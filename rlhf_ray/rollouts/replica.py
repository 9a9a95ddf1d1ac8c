"""The Serve shell around a rollout engine: constructs it, keeps it on the newest weights, forwards calls.

One deployment, no HTTP. A replica that starts late or again pulls the newest published weights from the learners'
bridge before it is ready, and a request names the version it needs, so that none is ever answered by older weights.

Where a learner shares its GPU the replica follows the bridge's turns: it waits for its own before it builds an engine,
which then starts alone; the engine sleeps while learners compute, and pulls the newest weights when it wakes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine
from rlhf_ray.rollouts.streams import FinishedGroups, cancel_all
from rlhf_ray.types import LoadReport, Prompt, SamplingSettings, TraceSpan, Trajectory
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest

__all__ = ["RolloutReplica", "engine_failure", "exceptions_in", "root_cause"]

_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .+)$")

# What names no cause by itself: vLLM's and Ray's wrappers around the line that does.
_WRAPPERS = (
    "Engine core initialization failed",
    "Engine core proc",
    "EngineCore encountered",
    "EngineDeadError",
    "ray.exceptions.",
    "Traceback",
)

_LOG_BYTES = 64 * 1024

# An engine's error may quote its whole configuration, or the prompts of a batch.
_LONGEST = 1000


def exceptions_in(lines: Iterable[str]) -> list[str]:
    """What the lines of a log say of exceptions, wrappers included: type and message of each, in their order."""
    found = (_ERROR_LINE.search(line.rstrip()) for line in lines)
    return [match.group(1) for match in found if match is not None]


def root_cause(lines: Iterable[str]) -> str | None:
    """The last line that names an exception other than a wrapper's; ``None`` when there is none."""
    causes = [named for named in exceptions_in(lines) if not any(wrapper in named for wrapper in _WRAPPERS)]
    return causes[-1] if causes else None


def engine_failure(error: BaseException) -> str:
    """Say in one line why the engine of this process could not start or has ended.

    What failed in this process is the error itself; what failed in the engine's own is in the log.
    """
    cause = f"{type(error).__name__}: {error}"
    if any(wrapper in cause for wrapper in _WRAPPERS):
        cause = root_cause(_own_log()) or cause
    return shortened(cause, _LONGEST)


def _own_log() -> list[str]:
    """The end of the file that this process's standard error is redirected to; empty where it is no file."""
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return []
    path = Path("/proc/self/fd/2")
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return log.read().decode(errors="replace").splitlines()


_LOG = logging.getLogger(__name__)

_CHECK_S = 0.5

_ORPHAN_CHECK_S = 5.0

_TELL_TIMEOUT_S = 5.0

_TURN_POLL_S = 30.0


class RolloutReplica:
    """One vLLM engine in the Serve pool.

    Args:
        spec: How to start the engine.
        bridge: Handle of the learners' bridge actor, which holds the newest published weights.
    """

    async def __init__(self, spec: EngineSpec, bridge: Any) -> None:  # type: ignore[misc]
        self._bridge = bridge
        self._timeline = spec.timeline
        self._failure: BaseException | None = None
        self._updating = asyncio.Lock()
        self._publication: str | None = None
        self._in_group = False
        self._in_transfer = False
        self._is_starting = True
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self._awake = asyncio.Event()
        # Serve starts again what a killed driver started, and would do so for ever.
        await self._check_run()
        if spec.colocated:
            self._attending = bridge.attend_turns.remote(self.replica_id, *self._whereabouts())
            await self._wait_turn(awake=False)
        try:
            self._engine = RolloutEngine(spec)
        except Exception as error:
            raise RuntimeError(f"EngineStartError: {engine_failure(error)}") from error
        self._watching = asyncio.gather(self._end_with_engine(), self._end_with_run())
        await self._engine.start(version=0)
        self._awake.set()
        if spec.colocated:
            self._following = asyncio.create_task(self._follow_turns())
        await self._catch_up(await bridge.newest_version.remote())
        self._is_starting = False

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        seeds: Sequence[int],
        max_tokens: Sequence[int],
        min_version: int,
    ) -> AsyncIterator[FinishedGroups]:
        """Write a rollout group for each prompt with weights of ``min_version`` or newer, each given when finished."""
        await self._awake.wait()
        await self._catch_up(min_version)
        finished: asyncio.Queue[asyncio.Task[tuple[Trajectory, ...]]] = asyncio.Queue()
        positions = {}
        for position, (prompt, seed, longest) in enumerate(zip(prompts, seeds, max_tokens, strict=True)):
            task = asyncio.create_task(self._engine.generate(prompt, sampling, seed=seed, max_tokens=longest))
            task.add_done_callback(finished.put_nowait)
            positions[task] = position
        try:
            left = len(positions)
            while left:
                done = [await finished.get()]
                # One engine step ends several groups: their tasks run next.
                await asyncio.sleep(0)
                while not finished.empty():
                    done.append(finished.get_nowait())
                left -= len(done)
                yield self.replica_id, [(positions[task], task.result()) for task in done]
        finally:
            await cancel_all(positions)

    async def load_weights(
        self, manifest: WeightManifest, refs: list[Any], replica_ids: frozenset[str] | None = None
    ) -> LoadReport:
        """Load a published version from the object store, unless this replica has pulled it or is not one of those."""
        if replica_ids is None or self.replica_id in replica_ids:
            await asyncio.shield(self._load(manifest, refs))
        return self._report()

    async def init_weight_transfer(self, init_infos: dict[str, dict[str, Any]]) -> LoadReport:
        """Join the transfer group, over NCCL under this replica's own rank offset, unless it came too late for that."""
        info = init_infos.get(self.replica_id)
        self._in_group = info is not None
        if info is not None:
            self._in_transfer = True
            async with self._failing():
                await self._engine.init_weight_transfer(info)
            self._in_transfer = False
        return self._report()

    async def begin_update(self) -> LoadReport:
        """Pause for weights that the learners are about to send (NCCL, ipc)."""
        if self._in_group:
            self._in_transfer = True  # Also while it waits: it would begin without learners that died meanwhile.
            await self._updating.acquire()
            async with self._failing():
                await self._engine.begin_update()
        return self._report()

    async def apply_update(self, update: dict[str, Any]) -> LoadReport:
        """Receive weights from the learners (NCCL, ipc)."""
        if self._in_group:
            async with self._failing():
                await self._engine.apply_update(update)
        return self._report()

    async def finish_update(self, version: int) -> LoadReport:
        """Resume under what was received (NCCL, ipc)."""
        if self._in_group:
            async with self._failing():
                await self._engine.finish_update(version)
            self._in_transfer = False
            self._updating.release()
            self._tell_pause()
        return self._report()

    async def abandon_update(self) -> LoadReport:
        """End this replica if it waits for learners that died while they sent weights; Serve starts another."""
        if self._in_transfer:
            _LOG.error("the learners died while they sent weights, and this replica ends with half of them")
            os._exit(1)
        return self._report()

    async def status(self) -> LoadReport:
        """Which replica this is and which version it serves."""
        return self._report()

    async def check_health(self) -> None:
        """Raise when an update failed half-way, so that Serve replaces this replica."""
        if self._failure is not None:
            raise RuntimeError(f"replica {self.replica_id} failed") from self._failure

    def __del__(self) -> None:
        """End the engine's process with the replica; Serve calls this on a graceful stop."""
        for watching in ("_watching", "_following"):
            if hasattr(self, watching):
                getattr(self, watching).cancel()
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    async def _wait_turn(self, *, awake: bool) -> None:
        """Tell the bridge how the engine is, and wait until it is to be otherwise."""
        actor, place = self._whereabouts()
        about = {"actor": actor, "place": place, "timeout_s": _TURN_POLL_S}
        while await self._bridge.follow_turn.remote(self.replica_id, awake=awake, **about) is None:
            pass

    @staticmethod
    def _whereabouts() -> tuple[Any, tuple[str, str]]:
        context = ray.get_runtime_context()
        return context.current_actor, (context.get_node_id(), ",".join(context.get_accelerator_ids().get("GPU", ())))

    async def _follow_turns(self) -> None:
        """Sleep and wake as the bridge says; an engine that cannot frees the GPU by its end, and another one starts."""
        from ray.exceptions import ActorDiedError

        try:
            while True:
                await self._wait_turn(awake=True)
                # Held until the engine is awake again: what is to be loaded meanwhile waits for it.
                await self._updating.acquire()
                self._awake.clear()
                async with self._failing():
                    await self._engine.sleep()
                await self._wait_turn(awake=False)
                async with self._failing():
                    await self._wake()
                self._updating.release()
                self._awake.set()
        except ActorDiedError:
            _LOG.info("the run has ended")
        except Exception:
            _end_process()

    async def _wake(self) -> None:
        """Wake, with the newest weights: before the cache takes its memory again."""
        from ray.exceptions import ObjectLostError

        await self._engine.wake_weights()
        newest = await self._bridge.current_weights.remote()
        if newest is not None and newest[0].publication != self._publication:
            try:
                buckets = await asyncio.gather(*newest[1])
            except ObjectLostError:  # They died with a learner; who needs them asks for others.
                buckets = None
            if buckets is not None:
                await self._engine.load_weights(newest[0], buckets)
                self._publication = newest[0].publication
        await self._engine.wake()

    async def _end_with_engine(self) -> None:
        """End this process when the engine's has ended: Serve replaces it at once, and no caller waits for its answers.

        vLLM waits for ever for a call that its process has not answered.
        """
        while not self._engine.is_dead:
            await asyncio.sleep(_CHECK_S)
        _end_process()

    async def _end_with_run(self) -> None:
        """Delete the application when the run has ended without doing so: Serve keeps what a killed driver started."""
        from ray.exceptions import ActorDiedError

        while True:
            await asyncio.sleep(_ORPHAN_CHECK_S)
            try:
                await self._check_run()
            except ActorDiedError:
                return

    async def _check_run(self) -> None:
        """Delete the application where the bridge has ended, and the run with it.

        Raises:
            ActorDiedError: It has.
        """
        from ray.exceptions import ActorDiedError

        try:
            await self._bridge.newest_version.remote()
        except ActorDiedError:
            app_name = serve.get_replica_context().app_name
            _LOG.error("the run is gone; its application %s is deleted", app_name)
            await asyncio.to_thread(serve.delete, app_name, _blocking=False)
            raise

    async def _catch_up(self, version: int) -> None:
        from ray.exceptions import ObjectLostError

        lost: str | None = None
        while self._engine.version < version:
            manifest, refs = await self._bridge.newest_weights.remote(version, lost)
            try:
                # A request that is cancelled meanwhile must not leave the engine half-loaded.
                await asyncio.shield(self._load(manifest, refs, at_least=version))
            except ObjectLostError:
                # They died with the learner that had put them into the object store.
                lost = manifest.publication

    async def _load(self, manifest: WeightManifest, refs: list[Any], at_least: int | None = None) -> None:
        """Load a publication; with ``at_least`` only where no other has brought that version meanwhile."""

        def is_needless() -> bool:
            is_newer = at_least is not None and self._engine.version >= at_least
            return is_newer or self._publication == manifest.publication

        if is_needless():
            return
        buckets = await asyncio.gather(*refs)
        async with self._updating:
            if is_needless():
                return
            async with self._failing():
                await self._engine.load_weights(manifest, buckets)
            self._publication = manifest.publication
            self._tell_pause()

    def _tell_pause(self) -> None:
        if self._timeline:
            name = f"load version {self._engine.version}"
            pause = TraceSpan.ending_now(f"replica {self.replica_id}", name, self._engine.pause_s)
            self._bridge.add_spans.remote([pause])

    @asynccontextmanager
    async def _failing(self) -> AsyncIterator[None]:
        """Remember an error that leaves the engine paused with half-loaded weights; a dead engine's is no answer."""
        try:
            yield
        except BaseException as error:
            self._failure = error
            await self._tell_failure(error)
            if self._engine.is_dead:
                # The caller must hear that this replica died, which another one makes good: the engine's own error
                # would end the run.
                _end_process()
            raise

    async def _tell_failure(self, error: BaseException) -> None:
        """Tell the bridge why: the caller may never hear it, since this replica ends, or the caller does."""
        message = engine_failure(error)
        _LOG.error("weights could not be loaded: %s", message)
        try:
            failure = ReplicaFailure(told_by=f"replica {self.replica_id}", message=message, is_new=self._is_starting)
            await asyncio.wait_for(self._bridge.replica_failed.remote(failure), _TELL_TIMEOUT_S)
        except Exception as lost:  # The bridge is gone, or out of reach: the error itself is what counts.
            _LOG.warning("the run was not told so: %r", lost)

    def _report(self) -> LoadReport:
        return LoadReport(replica_id=self.replica_id, version=self._engine.version, pause_s=self._engine.pause_s)


def _end_process() -> None:
    _LOG.error("the engine has ended or failed, and with it this replica")
    os._exit(1)
