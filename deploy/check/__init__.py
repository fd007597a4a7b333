"""Checks of what deploys vmwatch; see `run`."""
