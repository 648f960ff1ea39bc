"""Stability of training: loss and gradient spikes, values that are not finite, offending samples."""
