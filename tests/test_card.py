"""The card beside a model: the Hub reads it, hostile names stay text, and no folder of this machine is told."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nemotron_nb.core import write_json
from nemotron_nb.ops.artifacts import Source, Store
from nemotron_nb.ops.card import card_metadata, card_text, markdown_text, read_card, without_places, write_card
from nemotron_nb.ops.run_folder import set_status
from nemotron_nb.ops.stage import STAGES

HOSTILE = "a|b](javascript:alert(1)) <script>x</script> `rm` https://evil.example @you ![x](y)\n---\nlicense: mit\n# title"
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.sampled_from([HOSTILE, "---", "````", "</div>", "| --- |", "![](x)"])
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})


def run_of(folder: Path, name: str, path: str, stage: str = "sft") -> Path:
    """A run folder whose names are whatever they are."""
    set_status(folder, "done", command=f"nemotron nano3 {stage} {name}")
    write_json(folder / "manifest.json", {"datasets": [{"name": name, "path": path, "license": name, "weight": 0.5}], "rows": 3, "rejects": {name: 1}, "splits": {"train": {"tokens": 9}}})
    write_json(folder / "evaluation_before.json", {"loss_token": 2.0})
    write_json(folder / "evaluation_after.json", {"loss_token": 1.0, name: 0.5})
    write_json(folder / "env.json", {"git": {"commit": name}, "packages": {"torch": name}})
    (folder / "config.yaml").write_text(yaml.safe_dump({"family": "nano3", "model": {"name": name}, "data": {"path": path}}))
    write_json(folder / "origins.json", {"data.path": "command line", "model.name": name})
    (folder / "model").mkdir(exist_ok=True)
    return folder


def tokens_of(text):
    """All tokens of a Markdown text, inner ones too."""
    return [t for block in MARKDOWN.parse(text) for t in (block, *(block.children or []))]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(WORDS)
@example(HOSTILE)
def test_untrusted_text_is_shown_and_does_nothing(text):
    shown = markdown_text(text)
    assert {t.type for t in tokens_of(f"x {shown} y")} <= {"paragraph_open", "inline", "text", "paragraph_close", "text_special"}
    table = [t.type for t in tokens_of(f"| a | b |\n| --- | --- |\n| {shown} | y |")]
    cells = [t.content for t in MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {shown} | y |") if t.type == "inline"]
    assert cells == ["a", "b", shown.strip(), "y"] and not {"link_open", "image", "html_inline", "code_inline", "strong_open"} & set(table)


@pytest.fixture(scope="module")
def plain():
    """The kinds of tokens of a card whose names are harmless."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(Path(folder), "name", "chats.jsonl")
        return [t.type for t in MARKDOWN.parse(ModelCard(card_text(read_card(run, run / "model", STAGES["sft"], [], Store(run / "store")))).text)]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(WORDS, WORDS)
@example(HOSTILE, HOSTILE)
def test_a_card_has_the_same_parts_whatever_the_names_are(plain, name, path):
    folder = Path(tempfile.mkdtemp())
    try:
        run = run_of(folder, name, path)
        card = read_card(run, run / "model", STAGES["sft"], [Source(name, "chats", path, "ab" * 32)], Store(run / "store"))
        read = ModelCard(card_text(card))
        assert read.data.to_dict() == card_metadata(card) and read.data.license == "other"
        assert [t.type for t in MARKDOWN.parse(read.text)] == plain
        assert not {"html_inline", "html_block", "link_open", "image"} & {t.type for t in tokens_of(read.text)}
    finally:
        shutil.rmtree(folder)


PART = st.text("abcXYZ019_-", min_size=3, max_size=8)


@given(st.lists(PART, min_size=1, max_size=5), PART, st.sampled_from(["path={}", "{}", "'{}'", "a {} b", "x:{}", "~{}", "file://{}"]))
def test_no_absolute_path_is_told(parents, name, around):
    parents = [f"{p}!" for p in parents]  # a mark that the rest of the text does not hold
    told = without_places(around.format("/" + "/".join([*parents, name])))
    assert "!" not in told and name in told


def test_addresses_of_hub_and_register_stay():
    for text in ("hf://owner/name", "art://ModelArtifact-sft:v3", "data/chats.jsonl", "1/2", "and/or"):
        assert without_places(f"x {text} y") == f"x {text} y"


@pytest.mark.parametrize("stage", ["sft", "pretrain", "rl"])
def test_the_card_of_every_stage_that_makes_a_model(tmp_path, stage):
    run = run_of(tmp_path, "chats", "hf://owner/chats", stage)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"kind": "rl_valid", "step": s, "rewards": {"calls": r}}) + "\n" for s, r in ((0, 0.25), (9, 1.0))))
    base = Source("owner/base", "base model", "hf://owner/base")
    path = write_card(run, run / "model", STAGES[stage], [base], Store(run / "store"))
    read = ModelCard.load(path)
    assert (read.data.base_model, read.data.datasets, read.data.pipeline_tag) == ("owner/base", ["owner/chats"], "text-generation")
    assert stage in read.data.tags and read.data.library_name == "transformers"
    for part in ("Load it", "Data", "Licence", "Evaluation", "Settings", "Lineage"):
        assert f"\n## {part}\n" in read.text
    assert re.search(r"mean reward, calls \| 0.25 \| 1", read.text) and "| loss token | 2 | 1 |" in read.text


def test_an_adapter_says_so_and_an_unmeasured_model_too(tmp_path):
    run = run_of(tmp_path, "chats", "chats.jsonl")
    for when in ("before", "after"):
        (run / f"evaluation_{when}.json").unlink()
    (run / "model" / "adapter_config.json").write_text("{}")
    card = read_card(run, run / "model", STAGES["sft"], [Source("b", "base model", "hf://o/b")], Store(run / "store"))
    assert (card_metadata(card)["library_name"], card_metadata(card)["base_model_relation"]) == ("peft", "adapter")
    assert "Nothing was measured" in card_text(card) and "load_adapter" in card_text(card)


def test_lineage_goes_back_through_the_register(tmp_path):
    run = run_of(tmp_path / "run", "chats", "chats.jsonl")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("{}")
    store = Store(tmp_path / "store")
    data = store.log("DataBlendsArtifact-sft", "data", chats, {}, [Source("raw.jsonl", "chats", "/home/ann/raw.jsonl", "cd" * 32)], (), {"command": "nemotron data prep /home/ann/raw.jsonl"})
    text = card_text(read_card(run, run / "model", STAGES["sft"], [data], store))
    lines = text[text.index("## Lineage") :].splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["ModelArtifact-sft", "DataBlendsArtifact-sft:v1", "raw.jsonl"]
    assert "by: nemotron data prep …/raw.jsonl" in text and "/home" not in text
