"""The front page: made from its notebook, every link leads somewhere, every promise about files holds."""

import re
from pathlib import Path

import pytest

from nemotron_nb.ops.readme import readme

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_is_made_from_the_index_notebook():
    assert readme(ROOT / "nbs" / "index.ipynb") == README, "run: make readme"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?![a-z]+:|#)([^)]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_pictures_have_alternative_text():
    assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]", README))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z]+)", README + "\n".join(f"`{line}" for line in README.splitlines() if line.startswith("make "))))))
def test_the_commands_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
