"""Start-up of the commands, and nothing else."""
