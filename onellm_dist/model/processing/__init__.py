"""The processor: from prompts, conversations and media to the model's inputs."""
