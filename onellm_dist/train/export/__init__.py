"""The folders that a finished run leaves: the model, and its adapter."""
