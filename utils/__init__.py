"""What generate.py, train.py and evaluate.py share. Files are named after things of the domain."""
