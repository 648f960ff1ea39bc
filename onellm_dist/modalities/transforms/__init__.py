"""Computations on raw signals that give the reference's numbers."""
