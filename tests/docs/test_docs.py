"""The site: built from what is committed, every link leads somewhere, nothing is fetched when it is read."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urldefrag

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.ops import docs

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"


class Seen(HTMLParser):
    """What a page links to, loads, calls its places, and leaves without words."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.places, self.mute = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        """Note one tag."""
        given = dict(attributes)
        self.places |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in (None, "canonical"):
            self.loaded.append(given.get("href", ""))
        if tag == "img" and not (given.get("alt") or "").strip():
            self.mute.append(given.get("src", "")[:60])


WHOLE = ("index", "tour", "map", "loss/02_two_stage", "ops/11_docs")  # shown with code and outputs in the quick site too


def words_alone(root, folder):
    """A checkout with all words and all links, but with the code and the outputs of a few pages only: those take most of the time."""
    shutil.copytree(root / "papermill_runs", folder / "papermill_runs")
    for path in (p for p in (root / "nbs").rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts):
        target = folder / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        name = path.relative_to(root / "nbs").with_suffix("").as_posix()
        if path.suffix != ".ipynb" or name in WHOLE:
            shutil.copyfile(path, target)
            continue
        notebook = json.loads(path.read_text(encoding="utf-8"))
        kept = [c for c in notebook["cells"] if c["cell_type"] == "markdown" or "default_exp" in "".join(c["source"])]
        target.write_text(json.dumps(notebook | {"cells": kept}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["words", pytest.param("whole", marks=pytest.mark.long)])
def site(tmp_path_factory, request):
    """The folder of a site that was built now. Its words are built with Sphinx's plainest theme, which takes a third of the time."""
    pytest.importorskip("myst_nb", reason="Sphinx and MyST-NB come with the extra docs")
    target = tmp_path_factory.mktemp("site") / "docs"
    if request.param == "whole":
        return docs.build_site(target, ROOT).parent
    with mock.patch.object(docs, "CONF", docs.CONF.replace('html_theme = "furo"', 'html_theme = "basic"')):
        return docs.build_site(target, words_alone(ROOT, tmp_path_factory.mktemp("words"))).parent


@pytest.fixture(scope="module")
def pages(site):
    """Every page, read."""
    return {path: Seen(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_notebook_and_every_module_has_its_page(site):
    for notebook in NBS.rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in notebook.parts:
            assert (site / notebook.relative_to(NBS)).with_suffix(".html").exists(), notebook
    index = json.dumps(sorted(str(p.relative_to(site)) for p in site.rglob("api/*.html")))
    assert "data.mask" in index and "loss.two_stage" in index and "train.torch_engine" in index


def test_every_link_leads_to_a_page_and_a_place_on_it(site, pages):
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            address, place = urldefrag(link)
            target = (path.parent / unquote(address)).resolve() if address else path
            if not target.exists() or (place and target in pages and unquote(place) not in pages[target].places):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert not lost, lost[:20]


def test_nothing_is_fetched_from_elsewhere(pages):
    assert not [(path.name, source) for path, page in pages.items() for source in page.loaded if re.match(r"(https?:)?//", source)]


def test_pictures_have_words(pages):
    assert not [(path.name, page.mute) for path, page in pages.items() if page.mute]


def test_formulas_are_mathml_and_stored_outputs_are_shown(site):
    text = (site / "loss" / "02_two_stage.html").read_text(encoding="utf-8")
    assert "<mfrac>" in text and "[2pt]" not in text and "data:image/png;base64" in text or "_images/" in text


def test_hidden_cells_and_directives_stay_out(pages, site):
    for path in pages:
        assert not re.search(r'class="c1">#\|', path.read_text(encoding="utf-8")), path
    assert "test_eq, test_fail</span>" not in (site / "ops" / "11_docs.html").read_text(encoding="utf-8")


def test_a_link_to_nowhere_fails_the_build(tmp_path):
    pytest.importorskip("myst_nb", reason="Sphinx and MyST-NB come with the extra docs")
    (tmp_path / "nbs" / "images").mkdir(parents=True)
    (tmp_path / "papermill_runs").mkdir()
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Front\n> Where?\n\n[gone](data/99_gone.ipynb)"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(UserError, match="99_gone"):
        docs.build_site(tmp_path / "site", tmp_path)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("module", sorted(docs.modules_of(docs.pages_of(NBS), NBS)))
def test_every_public_function_says_what_it_does(module):
    found = importlib.import_module(module)
    text = docs.reference_page(module, docs.Page("x", "x", "x?"))
    for name in found.__all__:
        assert name == "setup" or f"## {name}\n" in text
    assert " at 0x" not in text


def test_every_notebook_leads_to_the_next():
    wanted = docs.reading_steps(docs.pages_of(NBS))
    for name, line in wanted.items():
        cells = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert "".join(cells[-1]["source"]) == line, f"{name}: run nemotron_nb.ops.docs.write_steps"


def test_contents_that_are_drawn_once_are_those_that_sphinx_draws_for_each_page(tmp_path):
    pytest.importorskip("myst_nb", reason="Sphinx and MyST-NB come with the extra docs")
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    (source / "conf.py").write_text(docs.CONF)
    lists = "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```" for title, names in (("Start", "tour\nmap"), ("Data", "data/mask\ndata/pack")))
    (source / "index.md").write_text(f"# Front\n\n## Where\n\n{lists}\n")
    for name in ("tour", "map", "data/mask", "data/pack"):
        (source / f"{name}.md").write_text(f"# The <{name}>\n\n## One\n\n## Two\n\n[front]({'../' if '/' in name else ''}index.md)\n")
    for once in "10":
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-d", str(tmp_path / f"trees{once}"), "-D", f"contents_once={once}", str(source), str(tmp_path / once)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    pages = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.html"))
    assert len(pages) >= 6
    for page in pages:
        assert (tmp_path / "1" / page).read_text() == (tmp_path / "0" / page).read_text(), page


def test_words_that_are_stemmed_once_have_the_stems_of_sphinx():
    english = pytest.importorskip("sphinx.search.en", reason="Sphinx comes with the extra docs").SearchEnglish
    words = re.findall(r"\w+", (ROOT / "README.md").read_text(encoding="utf-8"))
    plain, app = english({}), mock.Mock()
    app.builder.indexer.lang = english({})
    for page in ("tour", "map"):
        docs._stem_once(app, None, page)
        assert [app.builder.indexer.lang.stem(word) for word in words] == [plain.stem(word) for word in words]
