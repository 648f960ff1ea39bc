"""Callbacks: what looks at a run while it trains, one concern per file."""
