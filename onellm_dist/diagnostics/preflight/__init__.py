"""`onellm doctor --distributed`: every node is looked at, and the links between them, before a model is built."""
