"""`onellm doctor --distributed`: check all nodes and their links before a model is built."""
