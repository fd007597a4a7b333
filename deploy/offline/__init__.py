"""Runs the images and compose.yaml where no container registry can be reached. Everything comes from Debian packages,
from the local build and from the tools that ./dev installs."""
