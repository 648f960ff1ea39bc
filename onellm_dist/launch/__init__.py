"""Starting ranks: what a launcher says about this process, local ranks, and Slurm jobs."""
