"""Names of parameters in other programs' checkpoints, mapped to ours and back."""
