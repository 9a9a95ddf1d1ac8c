"""Settings of a run: their declaration, the fluent builder, YAML, checks, and the user code that they name."""
