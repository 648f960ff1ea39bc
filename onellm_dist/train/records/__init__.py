"""The formats of a run directory: metrics, events, exit file, lock and sample log. Free of torch."""
