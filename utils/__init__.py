"""What generate.py, train.py and evaluate.py share: seven files for all of them, and a folder for each stage."""

# For one release, names of the last one: `python -m utils.prompts`, and `utils.slurm`, which queued jobs ask for.
__path__ += [f"{__path__[0]}/generation", f"{__path__[0]}/launch"]
