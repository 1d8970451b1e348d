"""Is the run notebook a good citizen of papermill and of nbdev?"""

import ast
import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import nbformat
import papermill
import pytest

from nemotron_nb.core import UserError
from nemotron_nb.stages import sft
from nemotron_nb.ops.run_folder import read_status, set_status
from nemotron_nb.stages.sft import Parameters, given_parameters

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs" / "runs").glob("*.ipynb"))
SFT = ROOT / "nbs" / "runs" / "sft.ipynb"


def parameter_cells(path: Path) -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_exactly_one_parameters_cell_and_no_export(path):
    """Without the tag papermill injects at the top, and the notebook's defaults win without a word."""
    assert len(parameter_cells(path)) == 1
    sources = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
    assert not any("#| export" in s or "#| default_exp" in s for s in sources)


def test_the_parameters_are_commented_literals_of_the_types_that_are_checked():
    source = "".join(parameter_cells(SFT)[0]["source"])
    kinds = typing.get_type_hints(Parameters)
    values = {}
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), "literals only: what is computed here is computed before injection"
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert list(values) == list(kinds)
    assert given_parameters(values, set()) == Parameters(**values) == Parameters()
    assert all("  # " in line for line in source.splitlines())


def test_the_committed_notebook_survives_nbdev_clean(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    copy = Path(shutil.copy(SFT, tmp_path / "nbs" / "sft.ipynb"))
    nbdev_clean = Path(sys.executable).with_name("nbdev-clean")
    subprocess.run([str(nbdev_clean), "--fname", str(copy)], cwd=tmp_path, check=True, capture_output=True)
    assert len(parameter_cells(copy)) == 1
    assert copy.read_bytes() == SFT.read_bytes()


def test_the_run_notebooks_are_not_run_as_tests():
    assert (ROOT / "nbs" / "runs" / ".notest").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"familly": "nano3"}, "did you mean 'family'"), ({"overrides": "a=1"}, "expected list"), ({"family": 3}, "expected str"), ({"run_dir": None}, "expected str")],
)
def test_given_parameters_refuses_unknown_names_and_wrong_types(given, said):
    with pytest.raises(UserError, match=said):
        given_parameters({"family": "nano3"} | given, set())


def test_names_of_the_shell_are_no_parameters():
    before = {"In", "Out"}
    assert given_parameters({"In": [], "Out": {}, "_i1": "x", "config": "tiny"}, before) == Parameters()


def test_papermill_with_an_unknown_parameter_stops_at_the_first_cell(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(SFT, tmp_path / "out.ipynb", {"famly": "nano3", "work_dir": str(tmp_path)}, kernel_name="python3", progress_bar=False)
    assert e.value.ename == "UserError" and "did you mean 'family'" in e.value.evalue
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
    ran = [c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code" and c.execution_count]
    assert len(ran) == 4  # the snapshot, the defaults, what was injected, the check


@pytest.mark.parametrize(
    ("last_cell", "said"),
    [
        ("raise SystemExit(0)", "ended before its last cell"),
        ("import os; os.kill(os.getpid(), 9)", "kernel of the notebook died"),
        ("1/0", "the notebook failed: ZeroDivisionError: division by zero"),
        ("from nemotron_nb.core import UserError\nraise UserError('no luck', where='here', fix='try again')", "^here: no luck\n  what to do: try again$"),
    ],
    ids=["exit", "killed", "bug", "user"],
)
def test_however_the_notebook_ends_the_status_says_so(tmp_path, monkeypatch, last_cell, said):
    """papermill calls the first two a success and a crash; a run that did not reach its end has failed."""
    cells = [nbformat.v4.new_code_cell("family = 'nano3'", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(last_cell)]
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), tmp_path / "sft.ipynb")
    monkeypatch.setattr(sft, "RUN_NOTEBOOK", str(tmp_path / "sft.ipynb"))
    set_status(tmp_path, "running")
    with pytest.raises(Exception, match=said):
        sft.run_notebook(tmp_path, Parameters())
    assert read_status(tmp_path)["state"] == "failed" and re.search(said, read_status(tmp_path)["message"])
    assert (tmp_path / "notebook.ipynb").exists() and not (tmp_path / ".partial.ipynb").exists()
