"""Attention kernels for packed sequences: one file a backend, and the choice among them."""
