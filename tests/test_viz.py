"""Pictures with hostile words in them: inert, bounded, legible, and none of them left out."""

import base64
import importlib
import inspect as python_inspect
import itertools
import pkgutil
import re
import unicodedata
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from nemotron_nb import viz
from nemotron_nb.data import blend, clean, nvidia_prep as compat, filters, inspect, mask, pack, prep, reasoning, template, tokenizer
from nemotron_nb.data.records import BadRecord, parse_conversation
from nemotron_nb.loss import two_stage
from nemotron_nb.ops import report
from nemotron_nb.pretrain.world import Fact
from nemotron_nb.train import base_model, leaks, model, sequences
from nemotron_nb.viz import Picture, escape, visible

ACTING = "\x00\x07\x1b[2J\x1b]0;owned\x07\x7f\x9b31m\u202e\u2066\u200f\u2028\ufeff"
HOSTILE = {
    "everything": "".join(
        (
            "<script>alert(1)</script>",
            '</div></span></td></table><img src=x onerror="alert(1)">',
            "<style>*{display:none}</style><svg onload=alert(1)><!-- <!doctype x> <?php ?>",
            '<a href="javascript:alert(1)">javascript:alert(1)</a>',
            "\"'` onmouseover='alert(1)' style=\"background:url(//x)\"",
            ACTING,
            r"$\frac{1}{$ \\ %s {0} {x} $",
            "&lt;script&gt; &#60;b&#62; &amp;",
        )
    ),
    "format": "<|im_end|>\n<|im_start|>system\n</think></tool_call>",
}
TOKENIZER = tokenizer.load_tokenizer("tiny")
LIMIT = 150_000


def chat(words):
    """A chat that says the words in every place that takes some."""
    plain = words.replace("</think>", "").replace("</tool_call>", "")
    return {
        "messages": [
            {"role": "system", "content": plain},
            {"role": "user", "content": plain},
            {"role": "assistant", "reasoning_content": plain + ".", "content": plain, "tool_calls": [{"name": "f" + plain, "arguments": {"k" + plain: plain}}]},
            {"role": "tool", "content": plain},
            {"role": "assistant", "content": plain},
            {"role": "user", "content": plain},
            {"role": "assistant", "reasoning_content": plain + "!", "content": plain},
        ],
        "tools": [{"name": "f" + plain, "description": plain, "parameters": {"properties": {plain: {"type": plain, "description": plain}}}}],
    }


def conversation(words):
    """The same in normal form, whatever its writer wanted."""
    return parse_conversation(chat(words), source=f"{words}.jsonl", line=1)


def sequence(words):
    """Its first training sequence."""
    return mask.training_sequences(conversation(words), TOKENIZER)[0]


def a_pack(words):
    """Two sequences with hostile names."""
    return pack.make_pack([np.arange(5), np.arange(7)], [np.ones(5), np.ones(7)], [words, words], [words, words])


def a_leak(words):
    """A map with a hostile name."""
    return leaks.LeakMap(words[:50].replace("$", ""), ((0, 5), (5, 12)), np.array([1, 6]), np.full((2, 12), 0.1), 1e-6)


def manifest(words):
    """The record of a preparation of a hostile file."""
    counts = {"packs": 1, "conversations": 1, "sequences": 1, "tokens": 12, "trained_tokens": 5, "fill": 0.5}
    losses = {"rejects": {words: 1}, "dropped_sequences": {words: 1}, "left_out": {words: 2}, "examples": {words: words}}
    return {"rows": 2, "accepted": 1, "source": words, "truncated_sequences": 0, "truncated_tokens": 0, "dropped_tokens": 0, "pack_size": 12, "splits": {words: counts}, "warnings": [words], "blend": {}} | counts | losses | {"length_histogram": {"8": 1}}


def run(words):
    """A run folder's content, hostile throughout."""
    line = {"kind": "train", "step": 1, "stage": "token", "loss": 1.0, "loss_token": 1.0, "loss_sample": 1.0, "lr": 1e-3, "seconds": 1.0, "trained_tokens": 3, "tokens": 9}
    example = {"pieces": [words, words], "roles": ["user", words], "trained": [0, 1], "nll": [None, 1.0], "conversation_id": words}
    said = {"conversation_id": words, "prompt": words, "expected": words, "generated": words, "well_formed": False, "closed_think": False, "well_formed_tool_call": None, "ended": False}
    return line, {"example": example, "generations": [said] * 3}


def report_run(words):
    """A run whose settings are hostile."""
    fields = {name: None for name in report.Run.__dataclass_fields__}
    return report.Run(**(fields | {"config": {words: words}, "origins": {words: words}}))


def env(words):
    """The environment of a run on a hostile machine."""
    return {"git": {"commit": words, "dirty": True}, "python": words, "packages": {"torch": words}, "host": {"name": words, "cpu": words, "system": words, "cpus": 2}}


def a_base(words):
    """What was found of a base model that read a hostile source."""
    numbers = {"bytes": 9, "bits_per_byte": 1.5, "loss_token": 1.0}
    said = {"source": words, "prompt": words, "expected": words, "generated": words, "right_tokens": 1}
    return numbers | {"sources": {words: numbers}, "continuations": [said], "positions": [{"from": 0, "to": 4, "loss": 1.0}]}


def a_reader(words):
    """A training that reads one hostile source."""
    mixture = SimpleNamespace(blend=SimpleNamespace(dataset=np.zeros(4, int)), readers=[SimpleNamespace(tokens=64)], orders=[SimpleNamespace(sequence_length=8)])
    return SimpleNamespace(curriculum=None, lengths=None, mixture=mixture, begins=np.array([0, 2, 4]), names=[words], dataset=SimpleNamespace(sequence_length=8))


def a_ledger(words):
    """What cleaning did with hostile rows."""
    return {"rows": 2, "kept": 1, "masked": {"places": 0, "rows": 0}, "dropped": {words: 1}, "examples": {words: [{"source": words, "line": 1, "detail": words}]}}


PICTURES = {
    base_model.bits_table: lambda w: base_model.bits_table(a_base(w), a_base(w)),
    base_model.continuations_table: lambda w: base_model.continuations_table(a_base(w), a_base(w)),
    base_model.facts_table: lambda w: base_model.facts_table([Fact(w, w, w, "1")], [True]),
    base_model.positions_picture: lambda w: base_model.positions_picture(a_base(w), a_base(w)),
    sequences.passes_table: lambda w: sequences.passes_table(a_reader(w)),
    clean.ledger_table: lambda w: clean.ledger_table(a_ledger(w)),
    viz.token_strip: lambda w: viz.token_strip([w] * 9, [0, 1, 0] * 3, roles=[w, "user", "tool"] * 3, title=w, fold=9),
    viz.png: lambda w: viz.png(figure(), w),
    viz.table: lambda w: viz.table([{w: w, "n": 1.5}], title=w),
    viz.joined: lambda w: viz.joined([viz.table([[w]], header=[w])] * 3),
    viz.bars: lambda w: viz.bars({w: 3, "b": 0}, title=w),
    viz.share_bars: lambda w: viz.share_bars({"a": [1, 2.0], "b": [2, 0]}, [w, w]),
    tokenizer.split_picture: lambda w: tokenizer.split_picture(TOKENIZER, TOKENIZER.encode(w, special=False), title=w),
    template.x_ray: lambda w: template.x_ray(template.chunks(chat(w)["messages"], chat(w)["tools"]), title=w),
    template.x_ray_beside: lambda w: template.x_ray_beside(chat(w)["messages"], chat(w)["tools"], title=w),
    mask.mask_strip: lambda w: mask.mask_strip(sequence(w), TOKENIZER, title=w),
    mask.prompt_panel: lambda w: mask.prompt_panel(TOKENIZER.encode(w, special=False), TOKENIZER.encode(w + "x", special=False), TOKENIZER, title=w),
    mask.parity_panel: lambda w: mask.parity_panel(conversation(w), TOKENIZER),
    mask.mask_rows: lambda w: mask.mask_rows([w] * 4, {w: [1, 0, 1, 1]}, roles=[w] * 4, title=w),
    mask.mask_diff: lambda w: mask.mask_diff(conversation(w), TOKENIZER),
    mask.trained_fractions: lambda w: mask.trained_fractions([0.1, 0.5]),
    inspect.template_x_ray: lambda w: inspect.template_x_ray(conversation(w), mask.drafts(conversation(w))[0], TOKENIZER, title=w),
    compat.side_by_side: lambda w: compat.side_by_side(chat(w), TOKENIZER, title=w),
    reasoning.cut_picture: lambda w: reasoning.cut_picture(w, 3, TOKENIZER),
    reasoning.before_after: lambda w: reasoning.before_after(conversation(w), conversation(w), reasoning.Change(w, w, "cut", budget=3, why=w), TOKENIZER),
    reasoning.length_change: lambda w: reasoning.length_change([conversation(w)], [conversation(w)], TOKENIZER),
    filters.repetition_curve: lambda w: filters.repetition_curve({"a": w}),
    pack.length_bars: lambda w: pack.length_bars([3, 9], 5),
    pack.fill_bars: lambda w: pack.fill_bars([3, 9], 12),
    pack.cut_curve: lambda w: pack.cut_curve([3, 9]),
    pack.pack_bars: lambda w: pack.pack_bars([a_pack(w)], 12),
    blend.blend_table: lambda w: blend.blend_table({w: np.array([3])}, {w: 1.0}, blend.draw({w: np.array([3])}, {w: 1.0}, seed=1)),
    prep.length_histogram: lambda w: prep.length_histogram(prep.Manifest(manifest(w))),
    two_stage.accounting_table: lambda w: two_stage.accounting_table([two_stage.Rung("token", w, False, 1.0, 0.0, 0.0, True)]),
    two_stage.accounting_ladder: lambda w: two_stage.accounting_ladder([two_stage.Rung(s, "a way", False, 1.0, 0.0, 0.0, True) for s in ("token", "sample")]),
    model.parameter_table: lambda w: model.parameter_table({w: model.tiny_config(64)}),
    leaks.isolation_picture: lambda w: leaks.isolation_picture(a_pack(w), title=w.replace("$", "")[:60]),
    leaks.leak_picture: lambda w: leaks.leak_picture([a_leak(w)]),
    report.funnel_picture: lambda w: report.funnel_picture(manifest(w)),
    report.splits_picture: lambda w: report.splits_picture(manifest(w)),
    report.fill_picture: lambda w: report.fill_picture(manifest("a split")),
    report.arithmetic_picture: lambda w: report.arithmetic_picture({"parameters": 1, "plan": [[w, 3]]}),
    report.loss_picture: lambda w: report.loss_picture([run(w)[0]]),
    report.lr_picture: lambda w: report.lr_picture([run(w)[0]]),
    report.speed_picture: lambda w: report.speed_picture([run(w)[0]]),
    report.strips_picture: lambda w: report.strips_picture(run(w)[1], run(w)[1]),
    report.generations_picture: lambda w: report.generations_picture(run(w)[1], run(w)[1]),
    report.settings_picture: lambda w: report.settings_picture(report_run(w)),
    report.environment_picture: lambda w: report.environment_picture(env(w)),
}


def figure():
    """A small drawing."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1, 1))
    drawn.subplots()
    return drawn


def name_of(function):
    """A short name for the report of pytest."""
    return f"{function.__module__.rsplit('.', 1)[1]}.{function.__name__}"


class Inert(HTMLParser):
    """Fails on anything that a browser would do more with than show it."""

    TAGS = {"b", "br", "code", "details", "div", "i", "img", "p", "pre", "span", "summary", "table", "td", "th", "tr"}
    ATTRIBUTES = {"style", "title", "alt", "src"}

    def handle_starttag(self, tag, attrs):
        """Only known tags, known attributes, inline styles of plain words, and images that are their own data."""
        assert tag in self.TAGS, tag
        for name, value in attrs:
            assert name in self.ATTRIBUTES, (tag, name, value[:80])
            if name == "style":
                assert re.fullmatch(r"[-a-z0-9#%.,:; ()]*", value) and "url" not in value and "var(" not in value, value
            if name == "src":
                assert base64.b64decode(value.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")

    def handle_decl(self, decl):
        """No doctype or the like."""
        raise AssertionError(decl)

    handle_comment = handle_pi = unknown_decl = handle_decl


def balanced(page):
    """Every tag that opens is closed by its own kind, in order: a chat cannot close ours."""
    stack = []
    for closing, tag in re.findall(r"<(/?)([a-z0-9]+)", page):
        if tag in ("br", "img"):
            continue
        if not closing:
            stack.append(tag)
        else:
            assert stack and stack.pop() == tag
    assert not stack


def acts(text):
    """Characters of a text that do something unseen."""
    return sorted({c for c in text if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202e\u2066\u200f\ufeff")})


@pytest.mark.parametrize("words", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("function", PICTURES, ids=name_of)
def test_hostile_words_are_shown_and_do_nothing(function, words):
    try:
        picture = PICTURES[function](words)
    except BadRecord:
        pytest.skip("such a chat is refused before it is drawn")
    Inert().feed(picture.html)
    balanced(picture.html)
    assert not acts(picture.html) and not acts(picture.text)
    assert picture.text and repr(picture) == picture.text
    data, about = picture._repr_mimebundle_()
    assert ("text/html" in data) != ("image/png" in data)
    if picture.png:
        assert about["image/png"]["alt"] and 'alt="' in picture.html and len(picture.png) < LIMIT


@pytest.mark.parametrize("words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_words_with_numbers(words):
    strip = viz.token_strip([words] * 9, [1, 0, 1] * 3, roles=[words] * 9, values=[1.0, None, 0.0] * 3, value_name=words, title=words)
    Inert().feed(strip.html)
    balanced(strip.html)


# They put several pictures side by side or one below the other, each of its own size.
SEVERAL = (compat.side_by_side, mask.mask_diff, mask.parity_panel, reasoning.before_after, report.strips_picture, report.generations_picture, viz.joined, report.funnel_picture, prep.length_histogram)


@pytest.mark.parametrize("function", PICTURES, ids=name_of)
def test_words_of_ten_thousand_characters_are_cut(function):
    picture = PICTURES[function]('"' * 10_000)
    assert len(picture.html) < LIMIT * (3 if function in SEVERAL else 1)


# They draw the names of a model's own parts, or of rules, and get no word from outside.
WITHOUT_WORDS = {"engines.engine_picture", "lora.lora_picture", "lora.parameter_table", "verify.verdict_picture", "policy.quadrants_picture",
                 "needle.needle_picture", "needle.needle_table"}


def test_every_picture_function_is_tried():
    known, there = {name_of(f) for f in PICTURES}, set()
    parts = [(part, importlib.import_module(f"nemotron_nb.{part}")) for part in ("data", "loss", "generate", "train")]
    names = ["viz", *(f"{part}.{m.name}" for part, package in parts for m in pkgutil.iter_modules(package.__path__))]
    for name in names:
        if "megatron" in name or name in ("loss.kernel", "train.__main__"):
            continue
        module = importlib.import_module(f"nemotron_nb.{name}")
        own = (f for f in vars(module).values() if python_inspect.isfunction(f) and f.__module__ == module.__name__)
        there |= {name_of(f) for f in own if not f.__name__.startswith("_") and f.__annotations__.get("return") in (Picture, "Picture")}
    assert {"viz.token_strip", "mask.mask_diff", "leaks.leak_picture"} <= there
    assert there <= known | WITHOUT_WORDS, f"add to PICTURES: {sorted(there - known)}"


def test_escape_has_no_way_around():
    for code in (*range(0x3000), 0xFEFF, 0xD800, 0x1F600):
        shown = escape(chr(code))
        assert not acts(shown) and "<" not in shown.replace("<br>", "") and '"' not in shown and "'" not in shown
        if code > 32 and visible(chr(code)) == chr(code) and chr(code) not in "<>&\"'":
            assert shown == chr(code), "ordinary characters are left alone"


def test_the_last_gate():
    forgotten = Picture("<div><script>1</script><img src=x onerror=1><svg/onload=1><ScRiPt></div>", "\x1b[2J")
    Inert().feed(forgotten.html)
    assert forgotten.html.count("&lt;") == 5 and forgotten.text == "\u241b[2J"


@pytest.mark.parametrize("values", (None, "numbers"))
@pytest.mark.parametrize("length", (4096, 65_536))
def test_a_long_row_is_a_window_and_a_count(values, length):
    pieces, trained = ["\u00e9<\n ", "word", "<|im_end|>", '"'] * (length // 4), [0, 1, 1, 0] * (length // 4)
    roles = ["user", "assistant", "tool", "assistant"] * (length // 4)
    strip = viz.token_strip(pieces, trained, roles=roles, values=None if values is None else [0.123456] * length, special=[False, False, True, False] * (length // 4), window=length)
    assert len(strip.html) < LIMIT
    left = int(re.search(r"and (\d+) more tokens", strip.html)[1])
    drawn = strip.html.count("word")
    assert left < length and abs((length - left) / 4 - drawn) <= 1, "what is not drawn is counted"
    assert len(viz.token_strip(pieces, trained, roles=roles).html) < LIMIT
    assert len(strip.text) <= viz.LONGEST_TEXT + 50


def test_a_large_pack_is_summarised():
    ids = np.zeros(64, np.int32)
    full = pack.make_pack([ids] * 4096, [ids] * 4096, [f"chat {k}" for k in range(4096)])
    assert len(full) == 262_144
    for picture in (leaks.isolation_picture(full),):
        assert len(picture.png) < LIMIT and len(picture.text) < 1000 and "and 4088 more" in picture.text


def test_tables_and_bars_count_what_they_leave_out():
    assert "more rows" in viz.table([[k, "x" * 90] for k in range(5000)], header=["n", "text"]).html
    assert "more</div>" in viz.bars({str(k): k for k in range(5000)}).html
    assert "more pictures" in viz.joined([viz.table([["x" * 4000] * 20], header=range(20))] * 20).html


def test_folding_keeps_every_trained_token_and_counts_the_rest():
    rng = np.random.default_rng(0)
    for _ in range(50):
        trained = (rng.random(80) < 0.05).astype(int).tolist()
        pieces = [f"<{k}>" for k in range(80)]
        text = viz.token_strip(pieces, trained, fold=3).text
        shown = [int(k) for k in re.findall(r"<(\d+)>", text)]
        counted = sum(int(n) for n in re.findall(r"\[\.\.\. (\d+) tokens", text))
        near = [k for k in range(80) if any(trained[k : k + 4])]
        assert shown == near and counted == 80 - len(near)


def test_trained_and_special_tokens_have_a_shape_of_their_own():
    strip = viz.token_strip(["a", "b", "c"], [0, 1, 1], roles=["user", "assistant", "assistant"], special=[False, False, True])
    spans = re.findall(r'<span style="([^"]*)" title="([^"]*)">([abc])</span>', strip.html)
    look = {text: style for style, _, text in spans}
    assert "3px solid #ffffff" in look["a"] and "3px solid #0a7a2f" in look["b"] and "3px solid #0a7a2f" in look["c"]
    assert "background:#444444" in look["c"] and "background:#444444" not in look["b"]
    assert ">U</b>" in strip.html and ">A</b>" in strip.html, "a speaker has a letter as well as a colour"
    assert "\u00abbc\u00bb" in strip.text


def luminance(colour):
    """Relative luminance, WCAG."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("function", (viz.token_strip, viz.table, viz.bars, inspect.template_x_ray), ids=name_of)
def test_every_colour_of_text_has_its_own_background(function):
    """Light and dark themes: whoever sets one of the two sets both, with a contrast of at least 4.5."""
    page = PICTURES[function]("words")
    seen = 0
    for style in re.findall(r'style="([^"]*)"', page.html):
        rules = dict(rule.split(":", 1) for rule in style.split(";") if ":" in rule)
        if "color" in rules:
            one, other = sorted((luminance(rules["color"]), luminance(rules["background"])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, style
            seen += 1
    assert seen


CONES = {  # Machado, Oliveira and Fernandes 2009, in linear light
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cielab(colour, cones):
    """A colour as somebody with these cones sees it."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.clip(np.array(CONES[cones]) @ np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = np.cbrt(np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", CONES)
def test_speakers_are_told_apart_without_all_cones(cones):
    colours = [viz.ROLE_COLOURS[role] for role in ("system", "user", "tool", "assistant")]
    assert min(float(np.linalg.norm(cielab(a, cones) - cielab(b, cones))) for a, b in itertools.combinations(colours, 2)) > 15


def test_shares_add_up_and_the_rest_is_one_part():
    drawn = viz.share_bars({"a": [1] * 100, "b": [0] * 99 + [5]}, [f"chat {k}" for k in range(100)], most=10)
    assert "all others 90%" in drawn.text and "b: " in drawn.text and "all others 100%" in drawn.text
