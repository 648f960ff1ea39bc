"""Media spans in the LLM's sequence: where they stand in packs and in padded batches."""
