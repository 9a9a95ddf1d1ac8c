"""How much of everything a run does, derived from its settings.

``rlhf-ray config`` prints it, ``validate()`` checks the warm-up against it, and the learner reads the length of its
learning-rate schedule from it, so that all three agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.settings import Settings

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The sizes and counts of a run."""

    settings: Settings

    @property
    def completions(self) -> int:
        """Completions per iteration."""
        return self.settings.data.batch_size * self.settings.rollouts.group_size

    @property
    def minibatch_sizes(self) -> tuple[int, ...]:
        """Completions in each minibatch of one pass, in order.

        Where completions do not divide evenly, minibatches differ by at most one: the first
        ``completions % num_minibatches`` hold one completion more, and none is left out.
        """
        count = self.settings.training.num_minibatches
        smallest, larger = divmod(self.completions, count)
        return (smallest + 1,) * larger + (smallest,) * (count - larger)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per iteration."""
        return self.settings.training.num_epochs * self.settings.training.num_minibatches

    @property
    def passes(self) -> int:
        """Passes over a batch, of the policy or of the critic."""
        training = self.settings.training
        return max(training.num_epochs, training.critic_epochs or 0)

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the run, those of the critic's warm-up included, each with what is updated in it."""
        return self.settings.training.iterations * self.optimizer_steps

    @property
    def critic_optimizer_steps(self) -> int:
        """Optimizer steps of the critic in the run."""
        training = self.settings.training
        per_pass = training.critic_num_minibatches or training.num_minibatches
        return training.iterations * (training.critic_epochs or training.num_epochs) * per_pass

    @property
    def policy_optimizer_steps(self) -> int:
        """Optimizer steps of the policy in the run; where the warm-up may end early, the most there can be."""
        training = self.settings.training
        ends_early = training.critic_warmup_explained_variance is not None
        warmup = 0 if ends_early else training.critic_warmup_iterations
        return (training.iterations - warmup) * self.optimizer_steps

    @property
    def evaluations(self) -> int:
        """Evaluations that the run makes by itself."""
        evaluation, iterations = self.settings.evaluation, self.settings.training.iterations
        at_interval, rest = divmod(iterations, evaluation.interval) if evaluation.interval else (0, iterations)
        return evaluation.at_start + at_interval + (evaluation.at_end and rest > 0)

    @property
    def checkpoints(self) -> int:
        """Checkpoints that the run writes by itself, that of the last iteration among them."""
        interval = self.settings.checkpointing.interval
        return -(-self.settings.training.iterations // interval) if interval else 0

    def rows(self) -> list[tuple[str, str]]:
        """Return the schedule as lines of a label and a value, for printing."""
        training, rollouts, data = self.settings.training, self.settings.rollouts, self.settings.data
        longest = self.completions * ((rollouts.max_prompt_tokens or 0) + rollouts.max_new_tokens)
        largest, smallest = self.minibatch_sizes[0], self.minibatch_sizes[-1]
        sizes = f"{largest:,}" if largest == smallest else f"{smallest:,} or {largest:,}"
        of_policy = f" (policy {self.policy_optimizer_steps:,})" if training.critic_warmup_iterations else ""
        interval = self.settings.checkpointing.interval
        return [
            ("iterations", f"{training.iterations:,}"),
            ("prompts per iteration", f"{data.batch_size:,}"),
            ("completions per iteration", f"{self.completions:,} ({data.batch_size:,} x {rollouts.group_size:,})"),
            ("sampled tokens per iteration", f"at most {self.completions * rollouts.max_new_tokens:,}"),
            (
                "tokens per learner pass",
                "as the model's context allows" if rollouts.max_prompt_tokens is None else f"at most {longest:,}",
            ),
            ("minibatch", f"{sizes} completions"),
            (
                "optimizer steps per iteration",
                f"{self.optimizer_steps:,} ({_count(training.num_epochs, 'pass', 'passes')})",
            ),
            ("optimizer steps of the run", f"{self.total_optimizer_steps:,}{of_policy}"),
            ("completions of the run", f"{training.iterations * self.completions:,}"),
            ("evaluations", self._evaluations_text()),
            ("checkpoints", f"{self.checkpoints:,} ({_every(interval)})" if interval else "on request"),
        ]

    def _evaluations_text(self) -> str:
        evaluation = self.settings.evaluation
        times = ["before the first iteration"] if evaluation.at_start else []
        times += [_every(evaluation.interval)] if evaluation.interval else []
        times += ["after the last iteration"] if evaluation.at_end else []
        return f"{self.evaluations:,} ({', '.join(times)})" if times else "on request"


def _every(interval: int) -> str:
    return f"every {_count(interval, 'iteration', 'iterations')}"


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"
