"""What is written so that a run can be resumed where it stopped."""
