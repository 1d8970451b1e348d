"""A stage of three files in a folder: a module with settings class and row, a run notebook, an entry point."""

import os
from pathlib import Path

import nbformat

MODULE = '''
from dataclasses import dataclass

from nemotron_nb.ops.config import RunSection
from nemotron_nb.ops.stage import Stage


@dataclass(frozen=True)
class DemoConfig:
    """What the stage counts to."""

    family: str = ""
    x: int = 1
    run: RunSection = RunSection()


STAGE = Stage(
    name="demo",
    settings="demo_stage:DemoConfig",
    notebook="demo.ipynb",
    makes=("DemoArtifact",),
    words="Count to a number.",
    examples=("demo x=3", "demo {odd} x=4"),
    options=("--resume",),
    ends=("done", "preempted"),
)
'''
CELLS = (
    "from nemotron_nb.stages.sft import given_parameters\nnames_before = set(globals())",
    'family = ""\nconfig = "default"\noverrides = []\nrun_dir = ""\nwork_dir = ""',
    "parameters = given_parameters(globals(), names_before)",
    "from demo_stage import STAGE\n"
    "from nemotron_nb.ops.run_folder import STOP, set_status\n"
    "from nemotron_nb.stages.sft import begin_stage, enter_made\n"
    "effective, folder = begin_stage(STAGE, parameters, get_ipython())",
    "count = effective.settings.x\nassert count != 13, 'thirteen'",
    "(folder / 'made').mkdir(exist_ok=True)\n(folder / 'made' / 'count.txt').write_text(str(count))\n"
    "(folder / 'report.html').write_text(f'<p>{count}</p>')\n"
    "stopped = count == 7 and not (folder / 'again').exists()\n"
    "(folder / 'again').touch()\n"
    "made = None if stopped else enter_made(STAGE, effective, folder, folder / 'made')",
    "set_status(folder, 'preempted' if stopped else 'done')",
)


def add_package(folder: Path, package: str, **points: str) -> None:
    """A package with entry points of the group, as an installer would leave it."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[nemotron_nb.stages]\n{lines}")


def add_demo(folder: Path) -> dict[str, str]:
    """The three files of the stage `demo`; returns the environment in which Python finds them."""
    folder.mkdir()
    (folder / "demo_stage.py").write_text(MODULE)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel)
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder / "demo.ipynb")
    add_package(folder, "demo", demo="demo_stage:STAGE")
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
