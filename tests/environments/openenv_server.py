"""An OpenEnv server for tests: guess a number from 1 to 7. Its argument is the port."""

from __future__ import annotations

import random
import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    number: int


class Hint(Observation):
    text: str = ""
    tries: int = 0


class GuessEnvironment(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Hint:
        self.number = options.get("number") or random.Random(seed).randint(1, 7)
        self.tries = 0
        return Hint(text="Guess a number from 1 to 7:", done=options.get("number") == 0)

    def step(self, action: Guess, timeout_s: float | None = None, **options: Any) -> Hint:
        if action.number == 99:
            raise RuntimeError("99 is broken")
        self.tries += 1
        if action.number == self.number:
            return Hint(text="right", tries=self.tries, reward=1.0, done=True)
        return Hint(text="higher" if action.number < self.number else "lower", tries=self.tries, reward=-0.1)

    @property
    def state(self) -> State:
        return State()


app = create_fastapi_app(GuessEnvironment, Guess, Hint, max_concurrent_envs=8)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
