"""Losses: found by name, summed over a pack, and of pairs of answers (DPO)."""
