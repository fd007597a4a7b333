"""The parts of `./dev`: Python's standard library only, nothing to install before it runs.

    commands    the table of commands; help and exit codes
    up          `up`: from a fresh machine to a running stack
    inspect     `status`, `logs`, `down`
    checks      `test`: formatting, lints, builds, every test
    peer        `peer`: the tests of a driver against the real system that it speaks with
    bench       `bench`: measures on release builds; `soak`: the long forms of tests
    figures     what tests measured: shown, and written where `--json FILE` says

    stack       the programs of a stack: arguments, environment, order of start and stop
    machines    this machine's instance id, the machines of the test hypervisor
    guide       what `up` prints: the first row awaited, `curl` lines to paste
    state       .dev/: the lock, and what runs

    hypervisor  what `up --guest` has beside the stack: libvirtd and a real VM
    guest       that VM's image

    tools       nats-server and the database: from PATH, or into a cache
    venv        Python programs, each in an environment of its own
    apt         Debian packages, also from another release through the machine's own mirror
    cargo       the build

    terminal    colours, tables, one line of progress, problems told to people
    processes   process identities that survive reused pids; start, stop, run with progress
    ports       free ports
    layout      where things lie
"""
