"""From what the ranks reported to what is wrong with which node; no clocks, no network."""
