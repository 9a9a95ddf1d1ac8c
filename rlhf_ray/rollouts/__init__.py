"""Prompts become groups of trajectories, on a Serve pool of vLLM replicas."""
