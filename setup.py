"""What pyproject.toml cannot say: a wheel takes along the recipes, run notebooks and job scripts that lie beside the library."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("papermill_runs", "nbs/runs", "slurm")  # as in nemotron_nb.ops.profiles; tests/test_package.py keeps them equal
PACKAGED = "nemotron_nb/checkout"


class BuildWithCheckout(build_py):
    """The library, and what a run is made of besides it."""

    def run(self) -> None:
        """Build the library anew, then copy the folders into it. An editable installation has them beside it."""
        library = Path(self.build_lib, "nemotron_nb")
        if not self.editable_mode:
            shutil.rmtree(library, ignore_errors=True)  # of an earlier build: files that are gone would travel
        super().run()
        for part in () if self.editable_mode else SHIPPED:
            shutil.copytree(part, Path(self.build_lib, PACKAGED, part), ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(cmdclass={"build_py": BuildWithCheckout})
