"""Checkpoints of the trainable state: written by ranges, read at any number of ranks."""
