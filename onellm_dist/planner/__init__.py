"""Predicts a run before it is queued: memory, speed, traffic, hours."""
