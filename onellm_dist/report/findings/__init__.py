"""What to look at first in a run: a few sentences, each found by one rule."""
