"""Around the loop: what is written so that a run can go on where it stopped."""
