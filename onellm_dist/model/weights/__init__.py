"""Weights that come from elsewhere: read lazily, converted, or those of known towers."""
