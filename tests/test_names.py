"""Every name of the published texts has a place on the page of names: 424 rows, walked one by one."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = list(csv.DictReader(open(Path(__file__).parent / "cases" / "published_names.tsv", encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))


def plain(text):
    """A text without links, marks and line breaks, in small letters."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", text.replace("`", "").replace("**", "").replace("\\|", "|")).lower()


def shown(notebook):
    """What a reader sees of a notebook: its text and its results."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])
        for output in cell.get("outputs", ()):
            yield "".join(output.get("data", {}).get("text/plain", output.get("text", "")))


def words_of(row):
    """What has to stand on the page for a row: its words, or the item itself."""
    return row["words"].split(" & ") if row["words"] else [row["item"]]


@pytest.fixture(scope="module")
def page():
    return plain("\n".join(shown(ROOT / "nbs" / "help" / "names.ipynb")))


def test_every_published_name_has_a_place(page):
    missing = [f"{row['number']} {row['item']}: {words}" for row in ROWS for words in words_of(row) if plain(words) not in page]
    assert not missing, "\n".join(missing)


def test_no_row_is_left_out_or_told_twice():
    assert [int(row["number"]) for row in ROWS] == list(range(1, 425))
    assert len({(row["kind"], row["item"]) for row in ROWS}) == 424


@pytest.mark.parametrize("printed, right", [("Num Layers 32", "52"), ("Model Dimension 3008", "2,688"), ("K/V-heads 8", "2"), ("GenSol-Prover-V2", "Goedel-Prover-V2 (32B)"), ("arXiv 2506.XXXXX", "2512.20848"), ("Teacher Qwen3-Coder-480B", "A35B"), ("Tokenizer nvidia/NVIDIA-Nemotron-Nano-9B-v2", "the recipes take the tokenizer of the 30B base")])
def test_a_name_that_is_printed_wrong_is_told_with_what_is_right(page, printed, right):
    """The row says both, close to each other."""
    where = page.index(plain(printed))
    assert plain(right) in page[where : where + 400]


def test_links_of_the_page_lead_somewhere():
    text = "\n".join(shown(ROOT / "nbs" / "help" / "names.ipynb"))
    links = {link.partition("#")[0] for link in re.findall(r"\]\(((?![a-z]+:)[^)#]+)[^)]*\)", text)}
    assert links and not [link for link in links if not (ROOT / "nbs" / "help" / link).exists()]
