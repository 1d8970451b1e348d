"""Run the console script as a user does: in a process of its own, or in a child of this one."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from forked import Forked

from nemotron_nb.cli import main

NEMOTRON = Path(sys.executable).with_name("nemotron")
ONE_THREAD = {"OMP_NUM_THREADS": "1"} | os.environ  # models this small are slower with more

# The published form of env.toml.
ENV_TOML = """
[wandb]
project = "nemotron"
entity = "YOUR-TEAM"

[cli]
theme = "github-light"

[YOUR-CLUSTER]
executor = "slurm"
account = "YOUR-ACCOUNT"
partition = "batch"
nodes = 2
ntasks_per_node = 8
gpus_per_node = 8
mem = "0"
exclusive = true
mounts = ["/lustre:/lustre"]
"""


def nemotron(*words: str, cwd: Path, env: Mapping[str, str] = ONE_THREAD) -> subprocess.CompletedProcess:
    """`nemotron WORDS...` in the folder `cwd`, its output kept."""
    return subprocess.run([str(NEMOTRON), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def _main_of(words: tuple[str, ...], cwd: Path, packages: tuple[Path, ...]) -> None:
    """The console script, in a child."""
    os.chdir(cwd)
    sys.path[:0] = map(str, packages)
    sys.argv = ["nemotron", *words]
    main()


def forked_nemotron(*words: str, cwd: Path, packages: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    """The same of a command that starts no kernel, in a child of this process, which has imported everything; `packages`: folders of Python's path."""
    words = tuple(map(str, words))
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("output", "errors")]
        code = Forked(_main_of, words, cwd, packages, env=ONE_THREAD, output=said[0], errors=said[1]).wait(300)
        return subprocess.CompletedProcess(["nemotron", *words], code, *(path.read_text(encoding="utf-8") for path in said))
