"""Run the console script as a user does: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

NEMOTRON = Path(sys.executable).with_name("nemotron")
ONE_THREAD = {"OMP_NUM_THREADS": "1"} | os.environ  # models this small are slower with more


def nemotron(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    """`nemotron WORDS...` in the folder `cwd`, its output kept."""
    return subprocess.run([str(NEMOTRON), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
