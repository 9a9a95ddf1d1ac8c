"""Learner ranks as actors: started by Ray Train, commanded through one actor, restarted after failures."""
