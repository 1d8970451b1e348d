"""The notebooks as files: each asks one question, no cell stands twice, and none is too heavy to open."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_asks_one_question_once(path):
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells]
    title, *lines = [line for line in sources[0].splitlines() if line.strip()]
    assert title.startswith("# ") and (path.stem == "index" or path.parent.name == "runs" or lines[0].startswith("> ") and lines[0].endswith("?"))
    long = [s for s in sources if len(s) > 60]
    assert len(long) == len(set(long)), "a cell stands twice"
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_stored_pictures_have_words(path):
    """A code host and a screen reader find the alternative text in the metadata of the output."""
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output["metadata"].get("image/png", {}).get("alt", "").strip(), "".join(cell["source"])[:80]
