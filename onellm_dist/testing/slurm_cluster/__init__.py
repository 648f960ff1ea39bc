"""A throw-away Slurm of several nodes on one machine, and the rehearsal of a job under it."""
