"""Images and compose.yaml run for real where no container registry can be reached: everything comes from Debian's
packages, our own build and the tools that ./dev installs."""
