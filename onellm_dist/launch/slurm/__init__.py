"""Slurm jobs: rendering and submitting job scripts, and deciding what follows each start."""
