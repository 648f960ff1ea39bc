"""Training: the trainer, its engines, optimizers, checkpoints, callbacks and records."""
