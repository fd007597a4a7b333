"""`fuzz`: runs libFuzzer on the parsers of untrusted input, for a limited time."""

import os
import shutil
import subprocess

from . import cargo, cargotools, layout, processes, tools
from .terminal import EX_USAGE, Problem, Step, say, style

FOLDER = layout.ROOT / "tests" / "fuzz"
TARGETS = ["request", "python_repr", "sample", "block", "encoded_sample"]
SECONDS = 30


def fuzz(arguments) -> int:
    """Runs each fuzz target for the given number of seconds. Failing inputs are saved in tests/fuzz/artifacts."""
    if len(arguments) > 1 or not all(argument.isdecimal() and int(argument) > 0 for argument in arguments):
        raise Problem("./dev fuzz takes only a number of seconds", code=EX_USAGE)
    seconds = int(arguments[0]) if arguments else SECONDS
    cargo.check()
    tools.install_system([*tools.BUILD_NEEDS, tools.CXX])
    # The fuzz targets use the same versions of dependencies as the product.
    shutil.copyfile(layout.ROOT / "Cargo.lock", FOLDER / "Cargo.lock")
    target = layout.cache() / "build" / "fuzz"
    # RUSTC_BOOTSTRAP lets the stable compiler accept the unstable flags for libFuzzer's coverage.
    environment = {**cargo.environment(), "CARGO_TARGET_DIR": str(target), "RUSTC_BOOTSTRAP": "1"}
    command = [cargotools.program("cargo-fuzz"), "--fuzz-dir", FOLDER]
    with Step("building the fuzz targets") as step:
        build = [command[0], "build", *command[1:], "--sanitizer", "none"]
        processes.run(step, build, layout.LOGS / "fuzz.log", cargo.progress, env=environment, cwd=layout.ROOT)
        step.done()
    for name in TARGETS:
        # New inputs are saved in a copy of the corpus, so the committed corpus stays small.
        corpus = layout.DOT / "fuzz" / name
        shutil.copytree(FOLDER / "corpus" / name, corpus, dirs_exist_ok=True)
        say(f"\n{style(name, 'strong')}: {seconds} s")
        options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=2048", "-verbosity=0"]
        run = [command[0], "run", *command[1:], "--sanitizer", "none", name, corpus, "--", *options, "-print_final_stats=1"]
        code = subprocess.run(run, cwd=layout.ROOT, env={**os.environ, **environment}).returncode
        if code:
            raise Problem(f"{name}: found a failing input", f"The input is in {layout.short(FOLDER)}/artifacts/{name}.")
    return 0
