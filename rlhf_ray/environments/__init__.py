"""Multi-turn rollouts: environments, tools and agents, in worker processes."""
