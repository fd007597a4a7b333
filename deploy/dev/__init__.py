"""The implementation of `./dev`. It uses only Python's standard library, so it runs without installing anything.

    commands    the table of commands, the help text, and exit codes
    up          `up`: from a fresh machine to a running stack
    inspect     `status`, `logs`, `down`
    checks      `test`: formatting, lints, builds, tests
    package     `package`: builds the packages of the agent and the command line
    peer        `peer`: tests the Nova driver against a real OpenStack Nova
    bench       `bench`: runs benchmarks on release builds; `soak`: runs the long forms of the fault tests
    figures     prints the figures that tests measured, and writes them to the file given by --json

    stack       the programs of a stack: arguments, environment, order of starting and stopping
    bus         the configuration and the secrets of the stack's NATS server
    agents      enrols the stack's agents
    machines    the instance id of this machine, and the VMs of libvirt's test driver
    guide       the output of `up`: waits for the first rows and prints `curl` commands to paste
    state       the folder .dev/: the lock and the list of running programs

    hypervisor  libvirtd and the real VM that `up --guest` starts
    guest       the image of that VM

    tools       finds nats-server and the database in PATH or installs them into a cache
    venv        virtual environments for Python programs
    apt         installs Debian packages, also from another release
    cargo       builds the programs with cargo

    terminal    colours, tables, progress, error messages
    processes   starts, stops and identifies processes safely even if pids are reused
    ports       finds free ports
    layout      the paths of files and folders
"""
