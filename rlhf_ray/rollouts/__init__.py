"""Stage 2 of the loop: prompts become groups of completions, on a Serve pool of vLLM replicas."""
