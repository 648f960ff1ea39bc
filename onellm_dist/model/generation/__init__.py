"""Generation: answers to prompts with media, alone, padded or in running batches."""
