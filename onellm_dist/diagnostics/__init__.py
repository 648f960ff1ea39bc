"""`onellm doctor`: checks of this machine, and of all nodes of a job (`preflight`)."""
