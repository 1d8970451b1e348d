"""What may import what: the data layer lives without torch, and every arrow points one way."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "nemotron_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
LAYERS = {
    **{"core": -1, "viz": 0, "rehearsal": 0, "connection": 0, "usage": 0, "endpoint": 1, "data": 2, "loss": 2},
    **{"generate": 3, "pretrain": 3, "train": 4, "megatron": 5, "rl": 5, "compress": 5, "synth": 6, "ops": 7, "stages": 8, "cli": 9, "api": 9},
    **{"__main__": 10},
}
CHOOSES_ITS_ENGINE = ("train/__main__.py", "megatron")  # the one arrow that points up: it imports the engine it was asked for
HEAVY = ("torch", "triton", "transformers", "wandb", "ray", "megatron", "papermill", "matplotlib", "mistral_common", "modelopt")


def test_the_round_of_benchmarks_knows_every_script():
    """`make bench` leaves none out without a word."""
    known = runpy.run_path(str(ROOT / "benchmarks" / "all.py"))
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*known["BENCHMARKS"], *known["NOT_BENCHMARKS"]}


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
        if other is None or other == own or (str(path.relative_to(ROOT / "nemotron_nb")), other) == CHOOSES_ITS_ENGINE:
            continue
        assert LAYERS[other] < LAYERS[own], f"{path}: {own} must not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_star_imports(path):
    assert all("*" not in names for _, names in imported(path))


def closure(start):
    """The modules of the package that are loaded with one."""
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            taken = [(n if n.startswith("nemotron_nb") else f"nemotron_nb.{n}", names) for n, names in imported(ROOT / f"{name}.py")]
            places = [place.replace(".", "/") for module, names in taken for place in (module, *(f"{module}.{n}" for n in names))]
            todo += [place for place in places if (ROOT / f"{place}.py").is_file()]
    return found


def test_the_cache_of_tokens_is_named_by_every_module_that_decides_them():
    """A module that can change a token and is not in the list would leave old tokens in the cache."""
    from nemotron_nb.data import tokenized

    # pictures, a path, weights of whole datasets, and how a question travels and what it costs
    decides_nothing = {"viz", "data/sample", "data/blend", "rehearsal", "connection", "usage"}
    loaded = {name.removeprefix("nemotron_nb/") for name in closure("nemotron_nb/data/tokenized")}
    assert set(tokenized._MODULES) == loaded - decides_nothing


# What a process of a training may load at most: `python benchmarks/house.py` prints it. 40 and 48 it once was.
# Packs, their manifest and tokenizer come with the first pack; pictures and the release form when somebody asks for them.
@pytest.mark.parametrize("start, most", [("train.torch_engine", 20), ("megatron.engine", 24)])
def test_a_rank_loads_few_modules(start, most):
    house = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))
    graph = {name: {other for other, _ in pairs} for name, pairs in house["imports_of"](house["modules_of"](ROOT), at_import=True).items()}
    loaded = house["closure"](graph, start)
    assert len(loaded) <= most, sorted(loaded)


def python(code):
    blocked = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=ROOT)


def test_data_layer_works_without_heavy_packages(tmp_path):
    code = f"""
import nemotron_nb, nemotron_nb.core, nemotron_nb.viz
from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.data.shards import read_packs
made = prepare(PrepConfig(output_dir={str(tmp_path / "out")!r}, sample=20, pack_size=1024, workers=1))
assert len(read_packs(made.folder / "splits" / "train")) == made["splits"]["train"]["packs"]
assert "pandas" not in sys.modules  # Arrow would load it for one number
print(made["rows"])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "20"


def test_command_line_answers_help_without_heavy_packages():
    done = python("import sys; from nemotron_nb.cli import main; sys.argv = ['nemotron', '--help']; main()")
    assert done.returncode == 0, done.stderr
    assert "nano3" in done.stdout and "super3" in done.stdout


def test_a_model_that_is_not_there_is_refused_without_heavy_packages():
    """Seconds of PyTorch to say that a name is misspelt would be too many."""
    words = ["nemotron", "nano3", "sft", "-c", "tiny", "model.name=nobody/has-this"]
    done = python(f"from nemotron_nb.cli import main; sys.argv = {words!r}; main()")
    assert done.returncode == 1 and "no such model on this machine: 'nobody/has-this'" in done.stderr, done.stderr


SLOW = ("torch", "transformers", "triton", "numba", "matplotlib", "pandas")  # seconds of loading that a plan does without
PLANS = (
    "nano3 pretrain --dry-run", "nano3 sft --dry-run", "nano3 sft --dry-run train.engine=megatron", "nano3 rl --dry-run",
    "nano3 rl --dry-run -c dpo", "nano3 rl --dry-run -c rlhf", "super3 rl rlvr --dry-run", "nano3 rl --dry-run engine=nemo_rl",
    "nano3 eval --dry-run model=MODEL data.questions=sample", "nano3 compress --dry-run model=MODEL data.dir=MODEL/data",
    "super3 budget --dry-run model=MODEL chats=CHATS", "nano3 recipe --dry-run", "nano3 data prep sft --dry-run",
    "nano3 data prep pretrain --dry-run", "nano3 data prep rl --dry-run", "serve MODEL --dry-run",
)  # fmt: skip
LISTS = ("--help", "--version", "nano3 --help", "nano3 rl --help", "rl --help", "synth --help", "synth list", "runs", "artifacts")


@pytest.fixture
def described_model(tmp_path):
    """A folder that looks like a model, with prepared data inside; nobody who only plans opens its weights."""
    (tmp_path / "model" / "data").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "model" / "data" / "manifest.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("words", (*PLANS, *LISTS))
def test_a_plan_and_a_list_load_nothing_slow(words, described_model):
    """Who plans a run, or asks what there is, needs names and numbers, and no tensor."""
    chats = ROOT / "nemotron_nb" / "data" / "assets" / "sample_chats.jsonl"
    argv = words.replace("MODEL", str(described_model)).replace("CHATS", str(chats)).split()
    code = f"""
import sys
from nemotron_nb.cli import main
sys.argv = ["nemotron", *{argv!r}]
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
print("loaded:", *[name for name in {SLOW!r} if name in sys.modules])
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=described_model.parent, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_nothing_is_imported_or_set_that_nobody_uses():
    """Rules of Pyflakes: a name that is not used, is not known, or hides another one."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", "nemotron_nb", "tests", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
