"""Tensors in files: read later, one at a time, and written in one pass. No format is known here."""
