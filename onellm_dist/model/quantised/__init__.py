"""Frozen linear layers of the LLM whose weights are held rounded: 8 bits, 4 bits, float8."""
