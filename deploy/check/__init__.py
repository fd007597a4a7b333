"""Checks of the deployment files; deploy/check/run runs them."""
