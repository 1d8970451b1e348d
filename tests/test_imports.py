"""What may import what: the data layer lives without torch, and every arrow points one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "nemotron_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
LAYERS = {"core": 0, "viz": 0, "data": 1, "loss": 1, "train": 2, "rl": 3, "ops": 4, "__main__": 5}
HEAVY = ("torch", "triton", "transformers", "wandb", "ray", "megatron", "papermill", "matplotlib", "mistral_common")


def imported(path):
    """Absolute names of the project's modules that a module imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            yield ".".join(filter(None, [base, node.module or ""])), [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


def layer(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "nemotron_nb" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, _ in imported(path):
        other = layer(name)
        if other is None or other == own:
            continue
        assert LAYERS[other] < LAYERS[own], f"{path}: {own} must not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_star_imports(path):
    assert all("*" not in names for _, names in imported(path))


def python(code):
    blocked = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT)


def test_data_layer_works_without_heavy_packages(tmp_path):
    code = f"""
import nemotron_nb, nemotron_nb.core, nemotron_nb.viz
from nemotron_nb.data.prep import PrepConfig, prepare
print(prepare(PrepConfig(output_dir={str(tmp_path / "out")!r}, sample=20, pack_size=1024))["rows"])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "20"


def test_command_line_answers_help_without_heavy_packages():
    done = python("import sys; from nemotron_nb.ops.cli import main; sys.argv = ['nemotron', '--help']; main()")
    assert done.returncode == 0, done.stderr
    assert "nano3" in done.stdout and "super3" in done.stdout


def test_nothing_is_imported_or_set_that_nobody_uses():
    """Rules of Pyflakes: a name that is not used, is not known, or hides another one."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", "nemotron_nb", "tests", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
