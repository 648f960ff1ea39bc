"""`onellm samples`: which samples a step had, and what became of them. Free of torch."""
