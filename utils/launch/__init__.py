"""`python -m utils.launch`: a script here, in several local processes, or on SLURM."""
