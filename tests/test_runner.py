"""What executes the notebooks for `make test`: each in a fresh process, and every failure is told."""

import json
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).parents[1] / ".ci" / "notebooks"
NOTEBOOKS = {
    "one": "import json; json.left_behind = True",
    "other": "import json; assert not hasattr(json, 'left_behind')",
    "torch": "import torch; assert torch.ones(2).sum() == 2",
    "wrong": "assert 1 == 2, 'one is not two'",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


def executed(folder: Path, *names: str) -> subprocess.CompletedProcess:
    """The answer of the runner for a folder with these notebooks."""
    nbs = folder / "nbs"
    nbs.mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0"\n[tool.nbdev]\nnbs_path = "nbs"\n')
    for name in names:
        cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": NOTEBOOKS[name]}
        notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (nbs / f"{name}.ipynb").write_text(json.dumps(notebook))
    return subprocess.run([sys.executable, str(RUNNER), "--n-workers", "1"], cwd=folder, capture_output=True, text=True, timeout=300)


def test_each_notebook_has_a_process_of_its_own(tmp_path):
    done = executed(tmp_path, "one", "other", "torch")
    assert (done.returncode, done.stdout) == (0, "Success.\n"), done.stdout + done.stderr


def test_a_failure_and_a_death_are_told_and_the_others_executed(tmp_path):
    done = executed(tmp_path, "dies", "one", "wrong")
    assert done.returncode == 1 and "one is not two" in done.stderr and "dies.ipynb: its process ended with exit code -9" in done.stderr
    listed = done.stderr.partition("nbdev Tests Failed On The Following Notebooks:")[2]
    assert "dies.ipynb" in listed and "wrong.ipynb" in listed and "one.ipynb" not in listed, done.stderr
