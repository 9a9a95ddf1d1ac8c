"""Stage 6 of the loop: the new policy reaches every replica, versioned."""
