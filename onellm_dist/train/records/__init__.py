"""The formats of a run directory: metrics, events, exit file, lock, sample log. Free of torch."""
