"""The LLM: running any causal LM of transformers exactly, and checking that it is exact."""
