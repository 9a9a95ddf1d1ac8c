"""Asynchrony at scale, by simulation: the real rollout flow and admission, timed stand-ins for engines and learners.

Nothing sleeps: the event loop's clock jumps to the next thing that happens, so that 512 replicas and hours of training
take minutes of one core. What is simulated is what a GPU does: decoding, whose speed depends on how many sequences a
replica has, and updates, whose time depends on the tokens of the batch. Who is admitted, when a batch is made and how
stale it is, is the library's own code. Figures go to results/simulation.json.

    python benchmarks/simulation.py                     # as in simulation.yaml
    python benchmarks/simulation.py --controller        # the flow alone: groups a second, groups in flight
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import random
import selectors
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from provenance import write_result

from rlhf_ray.rollouts.admission import FlowRules
from rlhf_ray.rollouts.flow import RolloutFlow
from rlhf_ray.rollouts.rollouter import Engine, SingleTurn
from rlhf_ray.types import Prompt, RolloutGroup, SamplingSettings, ScoredGroup, Trajectory, VersionSpan

HERE = Path(__file__).parent
Model = dict[str, Any]


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer it moves the clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.now += max(0.0, timeout)
        return super().select(0)


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop on a clock of its own, in seconds from 0."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Simulated seconds."""
        return self._jumping.now


class Replica:
    """One engine: all its sequences advance together, slower the more there are; the rest waits in a queue."""

    def __init__(self, model: Model) -> None:
        counts, seconds = zip(*sorted(model["step_s"].items()), strict=True)
        self._step_s = [float(np.interp(n, counts, seconds)) for n in range(model["max_num_seqs"] + 1)]
        self._places = model["max_num_seqs"]
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._queue: list[tuple[float, asyncio.Future[None]]] = []
        self._tickets = itertools.count()
        self.progress = 0.0
        """Tokens that a sequence would have by now that had been there from the beginning."""
        self._since = 0.0
        self._paused_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.busy_s = 0.0
        self.tokens = 0.0

    @property
    def load(self) -> int:
        """Sequences here."""
        return len(self._running) + len(self._queue)

    async def write(self, length: int) -> None:
        """Return when a sequence of this length is written."""
        done = asyncio.get_running_loop().create_future()
        self._advance()
        self._queue.append((float(length), done))
        self._fill()
        await done

    def pause(self, seconds: float) -> None:
        """Stand still."""
        self._advance()
        self._paused_until = asyncio.get_running_loop().time() + seconds
        self._wait()

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        elapsed = max(0.0, now - max(self._since, self._paused_until))
        if self._running:
            steps = elapsed / self._step_s[len(self._running)]
            self.progress += steps
            self.tokens += steps * len(self._running)
            self.busy_s += elapsed
        self._since = now

    def _fill(self) -> None:
        while self._queue and len(self._running) < self._places:
            length, done = self._queue.pop(0)
            heapq.heappush(self._running, (self.progress + length, next(self._tickets), done))
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            loop = asyncio.get_running_loop()
            left = (self._running[0][0] - self.progress) * self._step_s[len(self._running)]
            self._timer = loop.call_at(max(loop.time(), self._paused_until) + left, self._end)

    def _end(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self.progress + 1e-6:
            heapq.heappop(self._running)[2].set_result(None)
        self._fill()


class Pool:
    """All replicas: where a prompt goes, how long its completions are, which versions wrote them."""

    def __init__(self, model: Model, replicas: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._lengths = model["lengths"]
        self._mu = np.log(self._lengths["mean"]) - self._lengths["sigma"] ** 2 / 2
        self.replicas = [Replica(model["engine"]) for _ in range(replicas)]
        # Per replica: how far it was when it began with each version.
        self._marks: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in self.replicas]

    def publish(self, version: int, pause_s: float) -> None:
        """Every replica stands still for a moment and goes on under the new version."""
        for replica, marks in zip(self.replicas, self._marks, strict=True):
            replica.pause(pause_s)
            marks.append((replica.progress, version))

    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int
    ) -> RolloutGroup:
        """Write a group on the less loaded of two replicas, as Serve chooses."""
        number = min(self._rng.choices(range(len(self.replicas)), k=2), key=lambda n: self.replicas[n].load)
        lengths = [self._length() for _ in range(sampling.group_size)]
        completions = await asyncio.gather(*(self._write(number, length) for length in lengths))
        return RolloutGroup(
            group_id=prompt.prompt_id, prompt=prompt, trajectories=tuple(completions), replica_id=str(number)
        )

    def _length(self) -> int:
        return int(min(max(1.0, self._rng.lognormvariate(self._mu, self._lengths["sigma"])), self._lengths["max"]))

    async def _write(self, number: int, length: int) -> Trajectory:
        replica, marks = self.replicas[number], self._marks[number]
        await replica.write(length)
        begun = replica.progress - length
        cuts = [(max(0, round(progress - begun)), version) for progress, version in marks if progress > begun]
        before = [version for progress, version in marks if progress <= begun]
        starts = [(0, before[-1])] if before else []
        starts += cuts
        ends = [start for start, _ in starts[1:]] + [length]
        spans = tuple(
            VersionSpan(version=version, start=start, end=end)
            for (start, version), end in zip(starts, ends, strict=True)
            if end > start
        )
        # One number, length times: nobody reads the tokens.
        return Trajectory.single_turn(
            token_ids=np.broadcast_to(np.int32(0), (length,)),
            sampling_logprobs=np.broadcast_to(np.float32(0), (length,)),
            asked_version=0,
            version_spans=spans,
            finish_reason="stop",
        )


class Scorer:
    """Rewards that cost nothing."""

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        """Give every completion 0."""
        rewards = np.zeros(len(group.trajectories), dtype=np.float32)
        return ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=(), reward_s=0.0)


def prompts() -> Any:
    """Endless prompts without a text."""
    nothing = np.zeros(1, dtype=np.int32)
    return (Prompt(prompt_id=number, token_ids=nothing, text="") for number in itertools.count())


def flow_of(
    generate: Callable[..., Any],
    *,
    batch_size: int,
    group_size: int,
    staleness: int,
    partial: bool = False,
    in_flight: int | None = None,
) -> RolloutFlow:
    """The library's own rollout flow over stand-ins."""
    return RolloutFlow(
        rollouter=SingleTurn(),
        engine=Engine(
            generate=generate,
            sampling=SamplingSettings(group_size=group_size, max_new_tokens=1, temperature=1.0),
            max_retries=0,
            timeout_s=1e9,
        ),
        scorer=Scorer(),
        prompts=prompts(),
        rules=FlowRules(
            batch_size=batch_size,
            max_staleness=staleness,
            max_concurrent=in_flight or (staleness + 1) * batch_size,
            max_failures=0,
            max_equal_groups=None,
            partial_rollouts=partial,
            greedy_baseline=False,
            stall_timeout_s=1e9,
            seed=0,
        ),
    )


async def train(model: Model, replicas: int, staleness: int, partial: bool, learner_gpus: float) -> dict[str, float]:
    """The Algorithm's schedule: collect, update, publish; figures after the pool has filled up.

    Speed counts the tokens that are trained on, not those that were carried over their bound.
    """
    loop = asyncio.get_running_loop()
    batch_size = model["batch_size"] * replicas // 64 or 1
    pool = Pool(model, replicas, seed=0)
    flow = flow_of(
        pool.generate, batch_size=batch_size, group_size=model["group_size"], staleness=staleness, partial=partial
    )
    learner, tokens, waited, stale, left_out = model["learner"], 0, 0.0, 0, 0
    means: list[float] = []
    # Until the first stale batch the pool is only filling.
    warm_up = staleness + 2
    for version in range(model["updates"] + warm_up):
        if version == warm_up:
            began, cpu = loop.time(), time.process_time()
            tokens, waited, means, left_out = 0, 0.0, [], 0
            busy = [replica.busy_s for replica in pool.replicas]
        asked = loop.time()
        collected = await flow.collect(version)
        waited += loop.time() - asked
        spans = [span for scored in collected.groups for c in scored.group.trajectories for span in c.version_spans]
        size = sum(span.end - span.start for span in spans)
        trained = [span for span in spans if version - span.version <= staleness] if partial else spans
        in_loss = sum(span.end - span.start for span in trained)
        stale = max(stale, *(version - span.version for span in trained))
        means.append(sum((version - span.version) * (span.end - span.start) for span in trained) / in_loss)
        tokens += in_loss
        left_out += size - in_loss
        # What is left out of the losses is still a context, in the forward pass and in the backward pass.
        await asyncio.sleep(learner["overhead_s"] + size / (learner["tokens_per_s"] * learner_gpus))
        await asyncio.sleep(learner["publish_s"])
        pool.publish(version + 1, model["engine"]["pause_s"])
        flow.published(version + 1)
    seconds = loop.time() - began
    working = [replica.busy_s - before for replica, before in zip(pool.replicas, busy, strict=True)]
    await flow.restart(0)
    return {
        "tokens_per_s": tokens / seconds,
        "update_s": seconds / model["updates"],
        "staleness_max": stale,
        "staleness_mean": statistics.mean(means),
        "left_out": left_out / (left_out + tokens),
        "replica_idle": 1.0 - statistics.mean(working) / seconds,
        "learner_idle": waited / seconds,
        "controller_cores": (time.process_time() - cpu) / seconds,
    }


def simulate(work: Coroutine[Any, Any, Any]) -> Any:
    """Run on simulated time."""
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        return runner.run(work)


async def controller_alone(groups: int, in_flight: int) -> dict[str, float]:
    """The flow over engines that answer at once: what the flow itself costs, in real time."""
    waiting: list[asyncio.Future[None]] = []
    most = 0

    async def generate(prompt: Prompt, sampling: SamplingSettings, *, seed: int, min_version: int) -> RolloutGroup:
        nonlocal most
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        most = max(most, len(waiting))
        await turn
        completion = Trajectory.single_turn(
            token_ids=np.zeros(1, dtype=np.int32),
            sampling_logprobs=np.zeros(1, dtype=np.float32),
            asked_version=0,
            version_spans=(VersionSpan(version=min_version, start=0, end=1),),
            finish_reason="stop",
        )
        return RolloutGroup(group_id=prompt.prompt_id, prompt=prompt, trajectories=(completion,), replica_id="r")

    async def answer() -> None:
        # While the pool is full, in an order of its own.
        rng = random.Random(0)
        while True:
            await asyncio.sleep(0)
            for _ in range(len(waiting) - in_flight + 256):
                waiting.pop(rng.randrange(256)).set_result(None)

    batch_size, staleness = 512, 4 * in_flight // 512
    flow = flow_of(generate, batch_size=batch_size, group_size=1, staleness=staleness, in_flight=in_flight)
    answering = asyncio.ensure_future(answer())
    await flow.collect(0)
    started = time.perf_counter()
    for version in range(1, groups // batch_size + 1):
        flow.published(version)
        await flow.collect(version)
    seconds = time.perf_counter() - started
    answering.cancel()
    await flow.restart(0)
    return {"groups_per_s": (groups // batch_size) * batch_size / seconds, "in_flight": float(most)}


def main() -> None:
    """Simulate every pool and bound, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "simulation.yaml")
    parser.add_argument("--replicas", nargs="+", type=int)
    parser.add_argument("--controller", action="store_true", help="only the flow's own speed")
    arguments = parser.parse_args()
    alone = asyncio.run(controller_alone(groups=50_000, in_flight=10_000))
    print(f"flow alone: {alone['groups_per_s']:,.0f} groups/s with {alone['in_flight']:,.0f} in flight")
    if arguments.controller:
        return
    model = yaml.safe_load(arguments.model.read_text())
    print(
        "replicas   staleness  tokens/s  speed-up  update s  stale max  mean  left out  replicas idle  learners idle  "
        "cores"
    )
    runs = []
    for replicas in arguments.replicas or model["replicas"]:
        share = model["learner"]["gpus_per_replica"]
        # The other way to be synchronous: all GPUs sample, then all GPUs train.
        everything = round(replicas * (1 + share))
        settings = [("colocated", everything, 0, False, float(everything))]
        settings += [(str(bound), replicas, bound, False, replicas * share) for bound in model["staleness"]]
        settings += [(f"{bound}, partial", replicas, bound, True, replicas * share) for bound in model["partial"]]
        base = 0.0
        for name, pool, bound, partial, learner_gpus in settings:
            figures = simulate(train(model, pool, bound, partial, learner_gpus))
            base = figures["tokens_per_s"] if name == "0" else base
            figures["speed_up"] = figures["tokens_per_s"] / base if base else float("nan")
            runs.append({"replicas": replicas, "staleness": name} | figures)
            print(
                f"{replicas:8d}  {name:>10}  {figures['tokens_per_s']:8,.0f}  {figures['speed_up']:8.2f}  "
                f"{figures['update_s']:8.1f}  {figures['staleness_max']:9.0f}  {figures['staleness_mean']:4.2f}  "
                f"{figures['left_out']:8.3f}  {figures['replica_idle']:13.2f}  {figures['learner_idle']:13.2f}  "
                f"{figures['controller_cores']:5.3f}",
                flush=True,
            )
    write_result("simulation", {"model": model, "controller": alone, "runs": runs})


if __name__ == "__main__":
    main()
