"""A throw-away Slurm on this machine, and the rehearsal of a run under it."""
