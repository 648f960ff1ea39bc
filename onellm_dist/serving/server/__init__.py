"""A server with the interface of OpenAI's chat completions, for all modalities of a model."""
