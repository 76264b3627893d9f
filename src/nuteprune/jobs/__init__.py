"""Whole jobs: what the commands and the Python calls of the package do."""
