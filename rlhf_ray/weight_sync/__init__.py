"""Weight sync: the new policy reaches every replica, under its version."""
