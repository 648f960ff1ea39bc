"""The code that a saved model carries, for machines where this package is not installed."""
