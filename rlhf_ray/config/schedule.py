"""Before the loop: how much of everything a run does, derived from its settings.

``rlhf-ray config`` prints it, ``validate()`` checks the warm-up against it, and the learner reads its minibatch sizes
and the length of its learning-rate schedule from it, so that all three agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rlhf_ray.config.settings import Settings

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The sizes and counts of a run.

    The fields are settings; everything else follows from them.
    """

    iterations: int
    """Iterations of the run."""
    prompts: int
    """Prompts an iteration."""
    group_size: int
    """Completions a prompt."""
    max_prompt_tokens: int | None
    """Longest prompt in tokens; None where only the model's context bounds it."""
    max_new_tokens: int
    """Longest completion in tokens."""
    num_epochs: int
    """Passes over each batch."""
    num_minibatches: int
    """Optimizer steps a pass."""
    critic_warmup_iterations: int
    """First iterations that update the critic alone."""
    evaluation_interval: int
    """Iterations between evaluations; 0 for none."""
    evaluation_at_start: bool
    """Whether there is one before the first iteration."""
    evaluation_at_end: bool
    """Whether there is one after the last iteration in any case."""
    checkpointing_interval: int
    """Iterations between checkpoints; 0 for none."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Derive the schedule of a run with these settings."""
        return cls(
            iterations=settings.training.iterations,
            prompts=settings.data.batch_size,
            group_size=settings.rollouts.group_size,
            max_prompt_tokens=settings.rollouts.max_prompt_tokens,
            max_new_tokens=settings.rollouts.max_new_tokens,
            num_epochs=settings.training.num_epochs,
            num_minibatches=settings.training.num_minibatches,
            critic_warmup_iterations=settings.training.critic_warmup_iterations,
            evaluation_interval=settings.evaluation.interval,
            evaluation_at_start=settings.evaluation.at_start,
            evaluation_at_end=settings.evaluation.at_end,
            checkpointing_interval=settings.checkpointing.interval,
        )

    @property
    def completions(self) -> int:
        """Completions an iteration."""
        return self.prompts * self.group_size

    @property
    def max_completion_tokens(self) -> int:
        """Most tokens that an iteration can sample."""
        return self.completions * self.max_new_tokens

    @property
    def max_tokens(self) -> int | None:
        """Most tokens, prompts included, in one pass of the learner; None where prompts have no limit of their own."""
        if self.max_prompt_tokens is None:
            return None
        return self.completions * (self.max_prompt_tokens + self.max_new_tokens)

    @property
    def minibatch_sizes(self) -> tuple[int, ...]:
        """Completions in each minibatch of one pass, in order.

        Where completions do not divide evenly, minibatches differ by at most one: the first
        ``completions % num_minibatches`` hold one completion more, and none is left out.
        """
        smallest, larger = divmod(self.completions, self.num_minibatches)
        return (smallest + 1,) * larger + (smallest,) * (self.num_minibatches - larger)

    @property
    def minibatch_size(self) -> int:
        """Completions in the largest minibatch."""
        return self.minibatch_sizes[0]

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps an iteration."""
        return self.num_epochs * self.num_minibatches

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the run, those of the critic's warm-up included."""
        return self.iterations * self.optimizer_steps

    @property
    def policy_optimizer_steps(self) -> int:
        """Optimizer steps of the run that update the policy."""
        return (self.iterations - self.critic_warmup_iterations) * self.optimizer_steps

    @property
    def total_completions(self) -> int:
        """Completions of the run, evaluations left out."""
        return self.iterations * self.completions

    @property
    def evaluations(self) -> int:
        """Evaluations that the run makes by itself."""
        interval = self.evaluation_interval
        at_interval = self.iterations // interval if interval else 0
        last_is_counted = interval > 0 and self.iterations % interval == 0
        return self.evaluation_at_start + at_interval + (self.evaluation_at_end and not last_is_counted)

    @property
    def checkpoints(self) -> int:
        """Checkpoints that the run writes by itself, that of the last iteration among them."""
        return -(-self.iterations // self.checkpointing_interval) if self.checkpointing_interval else 0

    def rows(self) -> list[tuple[str, str]]:
        """Return the schedule as lines of a label and a value, for printing."""
        return [
            ("iterations", f"{self.iterations:,}"),
            ("prompts per iteration", f"{self.prompts:,}"),
            ("completions per iteration", f"{self.completions:,} ({self.prompts:,} x {self.group_size:,})"),
            ("sampled tokens per iteration", f"at most {self.max_completion_tokens:,}"),
            (
                "tokens per learner pass",
                "as the model's context allows" if self.max_tokens is None else f"at most {self.max_tokens:,}",
            ),
            ("minibatch", self._minibatch_text()),
            (
                "optimizer steps per iteration",
                f"{self.optimizer_steps:,} ({_count(self.num_epochs, 'pass', 'passes')})",
            ),
            ("optimizer steps of the run", self._steps_text()),
            ("completions of the run", f"{self.total_completions:,}"),
            ("evaluations", self._evaluations_text()),
            ("checkpoints", _every(self.checkpoints, self.checkpointing_interval)),
        ]

    def _evaluations_text(self) -> str:
        times = ["before the first iteration"] if self.evaluation_at_start else []
        times += (
            [f"every {_count(self.evaluation_interval, 'iteration', 'iterations')}"] if self.evaluation_interval else []
        )
        times += ["after the last iteration"] if self.evaluation_at_end else []
        return f"{self.evaluations:,} ({', '.join(times)})" if times else "on request"

    def _minibatch_text(self) -> str:
        largest, smallest = self.minibatch_sizes[0], self.minibatch_sizes[-1]
        return f"{largest:,} completions" if largest == smallest else f"{smallest:,} or {largest:,} completions"

    def _steps_text(self) -> str:
        if not self.critic_warmup_iterations:
            return f"{self.total_optimizer_steps:,}"
        return f"{self.total_optimizer_steps:,} (policy {self.policy_optimizer_steps:,})"


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _every(times: int, interval: int) -> str:
    return f"{times:,} (every {_count(interval, 'iteration', 'iterations')})" if interval else "on request"
