"""From a program: one name a step, nothing loaded before it is used, and a type checker that agrees."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron_nb
from nemotron_nb.api import PUBLIC, load_public

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "cases" / "first_steps.py"
HEAVY = ("torch", "transformers", "triton", "wandb", "ray", "megatron", "matplotlib", "numpy", "papermill", "typer", "omegaconf")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_loads_nothing():
    blocked = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    code = blocked + "before = set(sys.modules)\nimport nemotron_nb\ndir(nemotron_nb)\nprint(*[m for m in set(sys.modules) - before if m not in sys.stdlib_module_names and m.partition('.')[0] not in sys.stdlib_module_names])"
    assert python(code) == ["nemotron_nb"]


def test_a_light_name_needs_no_heavy_package():
    blocked = f"import sys\nfor name in {[n for n in HEAVY if n not in ('numpy', 'omegaconf')]!r}: sys.modules[name] = None\n"
    code = blocked + "from nemotron_nb import inspect_chat, pack, prepare, read_chats, render\nprint(render([{'role': 'user', 'content': 'x'}])[:12])"
    assert python(code) == ["<|im_start|>"]


def test_every_public_name_is_there_documented_and_typed():
    assert set(PUBLIC) == set(nemotron_nb.__all__) <= set(dir(nemotron_nb))
    for name in PUBLIC:
        found = getattr(nemotron_nb, name)
        assert found is load_public(name) and inspect.getdoc(found), name
        if inspect.isfunction(found):
            annotated = inspect.get_annotations(found)
            assert set(inspect.signature(found).parameters) | {"return"} == set(annotated), name


def test_no_public_name_is_a_package_too():
    """`from nemotron_nb import pretrain` would give the one or the other, by what was imported before."""
    packages = {p.name for p in (ROOT / "nemotron_nb").iterdir()} | {p.stem for p in (ROOT / "nemotron_nb").glob("*.py")}
    assert not set(PUBLIC) & packages


def test_a_misspelt_name_leads_to_the_right_one():
    with pytest.raises(AttributeError, match="fine_tune"):
        nemotron_nb.finetune
    with pytest.raises(ImportError):
        from nemotron_nb import finetune  # noqa: F401


SETTINGS = """[mypy]
strict = True
follow_imports = silent
cache_dir = {cache}
mypy_path = {root}
[mypy-torch.*,transformers.*,matplotlib.*,omegaconf.*,numba.*,triton.*,papermill.*,pandas.*,pyarrow.*,wandb.*,ray.*,megatron.*,modelopt.*,peft.*,tokenizers.*,huggingface_hub.*]
follow_imports = skip
"""


def mypy(folder, source):
    """What mypy says of a program."""
    (folder / "mypy.ini").write_text(SETTINGS.format(cache=folder / "cache", root=ROOT))
    (folder / "program.py").write_text(source)
    return subprocess.run([sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "program.py"], cwd=folder, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_type_checker_accepts_the_first_steps_and_sees_mistakes(tmp_path):
    assert "Success" in mypy(tmp_path, SCRIPT.read_text())
    wrong = "from nemotron_nb import answer, fine_tune, pack, finetune\nfine_tune(settings=3)\nx: int = answer('m', 'q')\npack('abc', capacity='z')\nfine_tune().modell\n"
    said = mypy(tmp_path, wrong)
    for line, code in ((1, "attr-defined"), (2, "arg-type"), (3, "assignment"), (4, "arg-type"), (5, "attr-defined")):
        assert any(row.startswith(f"program.py:{line}:") and f"[{code}]" in row for row in said.splitlines()), said


@pytest.mark.long
def test_the_first_steps_run(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("trained tokens", "held-out loss", "assistant says", "README.md", "model.safetensors"):
        assert part in done.stdout
