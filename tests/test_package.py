"""The package as people install it: what must be inside, and a training in an empty folder, far from any checkout."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from nemotron_nb.ops import profiles

ROOT = Path(__file__).resolve().parents[1]
PACKED = "nemotron_nb/checkout"
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt")


def run(*command, cwd, **env):
    """A command that must succeed, its output kept. Threads and paths of this session do not reach it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NEMOTRON_", "SLURM_"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive that is built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "tree"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for part in ("nemotron_nb", *profiles.SHIPPED):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=copy)
    (archive,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", archive, "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def in_tree(part, under):
    """Files of a folder of the tree as they should stand in the wheel."""
    files = [p for p in (ROOT / part).rglob("[!.]*") if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]
    return {f"{under}/{p.relative_to(ROOT / part)}": p for p in files}


def test_the_wheel_holds_every_file_of_library_recipes_notebooks_and_scripts(wheel):
    wanted = in_tree("nemotron_nb", "nemotron_nb")
    for part in profiles.SHIPPED:
        wanted |= in_tree(part, f"{PACKED}/{part}")
    with zipfile.ZipFile(wheel) as packed:
        names = {n for n in packed.namelist() if not n.endswith("/") and ".dist-info/" not in n}
        assert names == set(wanted)
        assert [n for n in names if packed.read(n) != wanted[n].read_bytes()] == []
        for name in ("py.typed", "data/assets/sample_chats.jsonl", "data/assets/tokenizer/tokenizer.json", "cli.py"):
            assert f"nemotron_nb/{name}" in names
        (entry,) = [n for n in packed.namelist() if n.endswith("entry_points.txt")]
        assert "nemotron = nemotron_nb.cli:main" in packed.read(entry).decode()


def test_the_wheel_says_which_pythons_it_is_for(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [n for n in packed.namelist() if n.endswith(".dist-info/METADATA")]
        about = packed.read(name).decode()
    assert "Requires-Python: >=3.11" in about and "License-Expression: Apache-2.0" in about
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in about


def test_the_build_copies_what_the_library_looks_for():
    """setup.py cannot import the library that it builds, so it says the same once more."""
    said = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(n, ast.Assign)}
    assert said == {"SHIPPED": profiles.SHIPPED, "PACKAGED": f"nemotron_nb/{profiles.PACKAGED}"}


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)], ids=lambda v: f"{v[0]}.{v[1]}")
def test_every_module_is_grammar_of_each_python(version):
    for path in sorted((ROOT / "nemotron_nb").rglob("*.py")):
        ast.parse(path.read_text(), str(path), feature_version=version)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment that has the wheel; everything else it takes from this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", "-q", wheel, cwd=folder)
    (purelib / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_outside_a_checkout_everything_is_found_inside_the_package(installed, tmp_path):
    code = """
import nemotron_nb, sys
from nemotron_nb.ops.profiles import library_folder, project_root, work_folder
from nemotron_nb.ops.config import config_file
from pathlib import Path
library = library_folder()
assert library.is_relative_to(sys.prefix), library
assert project_root() == library / "checkout" and work_folder() == Path.cwd()
print(config_file("nano3", "sft", "tiny").relative_to(library))
"""
    assert run(installed / "python", "-c", code, cwd=tmp_path).split() == ["checkout/papermill_runs/nano3/sft/tiny.yaml"]


def test_a_job_script_names_the_package_as_its_root(installed, tmp_path):
    (tmp_path / "env.toml").write_text('[cluster]\nexecutor = "slurm"\npartition = "batch"\n')
    shown = run(installed / "nemotron", "nano3", "sft", "-c", "tiny", "--batch", "cluster", "--dry-run", cwd=tmp_path)
    library = Path(run(installed / "python", "-c", "import nemotron_nb; print(nemotron_nb.__path__[0])", cwd=tmp_path).strip())
    assert f"export NEMOTRON_ROOT={library / 'checkout'}\n" in shown and f"export NEMOTRON_BIN={installed}\n" in shown
    assert "run_and_wait papermill" in shown, "the script holds what all scripts do"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env.toml"]


@pytest.mark.long
def test_a_training_in_an_empty_folder(installed, tmp_path):
    said = run(installed / "nemotron", "nano3", "sft", "-c", "tiny", "train.train_iters=3", cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["output"]
    (report,) = [line.removeprefix("Report: ") for line in said.splitlines() if line.startswith("Report: ")]
    folder = (tmp_path / report).parent
    assert (folder / "report.html").exists() and (folder / "model" / "model.safetensors").exists()
    origins = (folder / "origins.json").read_text()
    assert "papermill_runs/nano3/sft/tiny.yaml" in origins and "site-packages" not in origins
