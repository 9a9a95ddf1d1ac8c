"""Around the loop: the Algorithm that composes the six stages, and the algorithms there are."""
