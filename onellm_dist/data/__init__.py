"""The data plane: what is read in which step, and how it is packed."""
