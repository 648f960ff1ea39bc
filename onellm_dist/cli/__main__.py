"""`python -m onellm_dist.cli`, for launchers that start modules."""

from onellm_dist.cli import main

main()
