"""One private Slurm for all tests of this folder."""

import os
import signal
import sys

import pytest
from cluster import FOREIGN, Cluster, missing


@pytest.fixture(scope="session")
def cluster():
    """A Slurm of two nodes; skipped where its programs are missing. The library's own calls of sbatch reach it too."""
    if missing():
        pytest.skip(f"not on this machine: {', '.join(missing())} (Debian and Ubuntu: apt-get install slurm-wlm munge)")
    started = Cluster()
    before = dict(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit from outside must not leave the programs behind
    try:
        started.up()
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        os.environ |= {"SLURM_CONF": started.env["SLURM_CONF"], "PATH": started.env["PATH"]}
        yield started
    finally:
        os.environ.clear()
        os.environ.update(before)
        started.down()
