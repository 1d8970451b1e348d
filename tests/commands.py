"""Run the console script as a user does: in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

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
