"""A chat with a model in a browser, about media of all its modalities (extra `ui`)."""
