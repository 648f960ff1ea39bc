"""Whole runs that show the package works: the demo, the integration run, and a throw-away Slurm."""
