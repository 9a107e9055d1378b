"""The contract on disk: a generated dataset's folder, its state, its gallery and its packed copy."""
