"""Engines shard the model over the ranks and step it; each folder is one engine."""
