"""Scorers: from predictions and references to numbers with intervals."""
