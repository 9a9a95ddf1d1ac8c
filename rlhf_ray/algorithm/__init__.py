"""The training loop and what starts, resumes and ends it."""
