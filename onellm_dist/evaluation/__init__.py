"""What a model can do: answers to the samples of test splits, and their scores."""
