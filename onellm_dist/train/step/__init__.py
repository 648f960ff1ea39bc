"""One optimizer step on this rank: its micro-batches, values, FLOPs and time."""
