"""Worker processes that read samples, and the limits of a sample in them."""
