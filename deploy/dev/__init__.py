"""The implementation of `./dev`. It uses only Python's standard library, so that it runs without installing anything.

    commands    table of commands, help, exit codes
    up          `up`: from a fresh machine to a running stack
    inspect     `status`, `logs`, `down`
    checks      `test`: formatting, lints, builds, tests
    peer        `peer`: tests a driver against the real system
    bench       `bench`: benchmarks on release builds; `soak`: long forms of the fault tests
    figures     results that tests measured: printed, and written for `--json FILE`

    stack       programs of a stack: arguments, environment, start and stop order
    machines    instance id of this machine, VMs of the test hypervisor
    guide       output of `up`: waits for the first rows, prints `curl` lines to paste
    state       .dev/: the lock and the running programs

    hypervisor  libvirtd and the real VM of `up --guest`
    guest       image of that VM

    tools       nats-server and the database, from PATH or a cache
    venv        virtual environments for Python programs
    apt         Debian packages, also from another release
    cargo       the build

    terminal    colours, tables, progress, error messages
    processes   process identities that survive reused pids; start, stop, run with progress
    ports       free ports
    layout      paths
"""
