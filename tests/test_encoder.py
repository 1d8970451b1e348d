"""The encoder: every tier gives the ids of the package `tokenizers`, or is not used."""

import itertools
import json
import multiprocessing
import pickle
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from nemotron_nb.core import UserError
from nemotron_nb.data import encoder as en
from nemotron_nb.data.tokenizer import SPECIAL_TOKENS, WORDS_PATTERN, ChatTokenizer, chat_tokenizer, load_tokenizer

TINY = load_tokenizer("tiny")
LARGE = 1 << 30  # bytes to come, for "auto"

# Text in which borders between kinds of characters are frequent, and so are runs.
kinds = st.sampled_from([*"aAzZéÉǅʰラ中²1٣½ \n\r\t\u00a0\u3000\u2028\u0301\u0300\u200d👩🚀.,/!'_-\x00\x1c\x85\ufeff", "  ", "\n\n", "the", "lamp", " of", "://"])
runs = st.tuples(kinds, st.integers(1, 40)).map(lambda pair: pair[0] * pair[1])
anything = st.text(st.characters(exclude_categories=["Cs"]))
texts = st.lists(st.one_of(anything, st.sampled_from(SPECIAL_TOKENS), runs, kinds, kinds), max_size=12).map("".join)
batches = st.lists(texts, max_size=6)


@pytest.fixture(scope="session", autouse=True)
def classes():
    """The engine is asked once a session; it takes more than a second."""
    asked = en.character_classes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(en, "character_classes", asked.copy)
        yield asked


@pytest.fixture(scope="session")
def tables(classes) -> en.Tables:
    return en.derive_tables(TINY)


@pytest.fixture(scope="session")
def tekken() -> ChatTokenizer:
    """As the user's cache has it: `test_tokenizer.py` makes it anew."""
    pytest.importorskip("mistral_common")
    return load_tokenizer("tekken")


@pytest.fixture(scope="session")
def tekken_by_tiktoken(tekken, tmp_path_factory) -> en.SegmentEncoder:
    pytest.importorskip("tiktoken")
    encoder = en.make_encoder(tekken, "tiktoken", cache_dir=tmp_path_factory.getbasetemp() / "tables")
    assert encoder.left_over == 0, "what was left over in the trial is not counted"
    return encoder


@pytest.fixture(scope="session", params=["tiny numba", "tiny words", "tiny tokenizers", "tekken numba", "tekken tiktoken", "tekken words"])
def encoder(request, tmp_path_factory) -> en.SegmentEncoder:
    """Every tier that is offered, once a session."""
    name, tier = request.param.split()
    if request.param == "tekken tiktoken":
        return request.getfixturevalue("tekken_by_tiktoken")
    if tier in ("numba", "tiktoken"):
        pytest.importorskip(tier)
    return en.make_encoder(TINY if name == "tiny" else request.getfixturevalue("tekken"), tier, cache_dir=tmp_path_factory.getbasetemp() / "tables")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> en.SegmentEncoder:
    pytest.importorskip("numba")
    return en.make_encoder(TINY, "numba", cache_dir=tmp_path_factory.getbasetemp() / "tables")


def assert_same(encoder: en.SegmentEncoder, batch: Sequence[str]) -> None:
    ids, offsets = encoder.encode(batch)
    assert (ids.dtype, offsets.dtype, len(offsets), offsets[0], offsets[-1]) == (np.int32, np.int64, len(batch) + 1, 0, len(ids))
    for text, start, end in zip(batch, offsets, offsets[1:]):
        assert ids[start:end].tolist() == encoder.tokenizer.encode(text, special=False), ascii(text)[:200]


# The same ids


@settings(max_examples=150, deadline=None)
@given(batch=batches)
def test_same_ids_on_anything(encoder, batch):
    assert_same(encoder, batch)


def test_same_ids_on_all_categories(encoder, tables):
    """Characters of every class and every plane, alone, in pairs and in runs."""
    r = random.Random(0)
    groups = [np.flatnonzero(tables.classes == kind) for kind in np.unique(tables.classes) if kind]
    some = lambda: chr(r.choice(r.choice(groups)))  # noqa: E731
    batch = ["".join(r.choice([some(), some() * r.randrange(1, 4), " ", "\n", "the", "A"]) for _ in range(300)) for _ in range(150)]
    assert_same(encoder, batch)


def test_nothing_and_empty_texts(encoder):
    for batch in ([], [""], ["", "", ""], ["", "a", "", "b c", ""]):
        assert_same(encoder, batch)


def test_no_special_token_comes_out(encoder):
    ids, _ = encoder.encode([*encoder.tokenizer.special_ids])
    assert not set(ids.tolist()) & set(encoder.tokenizer.special_ids.values())


def test_long_words(encoder):
    """Around every limit: of the memo, of a regular expression, and of the working space."""
    for length in (63, 64, 65, 127, 4095, 4096, 4097, 10_000):
        assert_same(encoder, [mark * length for mark in ("a", " ", "\n", "=", "ラ", "aA", "\t ")])
    r = random.Random(1)
    assert_same(encoder, ["".join(r.choices("abcdefgh", k=20_000)), "one two", "".join(r.choices("ラプンランプ中国語", k=5000))])


def test_lone_surrogate_is_an_error(encoder):
    with pytest.raises(UserError, match=r"text 1, character 2: a lone surrogate, U\+D83D"):
        encoder.encode(["good", "a \ud83d"])


# The parts, without a compiler


def assert_cut_alike(tables: en.Tables, text: str) -> None:
    data, ends = np.frombuffer(text.encode() or b"a", np.uint8), []
    while (ends[-1] if ends else 0) < len(text.encode()):
        ends.append(en.next_word(data, ends[-1] if ends else 0, len(data), tables.classes))
    words = [word for word, _ in pre_tokenizers.Split(Regex(WORDS_PATTERN), "isolated").pre_tokenize_str(text)]
    assert ends == list(itertools.accumulate(len(word.encode()) for word in words))


@given(text=texts)
def test_next_word_is_the_pattern(tables, text):
    assert_cut_alike(tables, text)


def test_next_word_is_the_pattern_where_any_three_kinds_meet(tables):
    assert_cut_alike(tables, "".join(map("".join, itertools.product("aAǅラ1 \n\r\u00a0\u0301,/", repeat=3))))


@given(text=texts)
def test_the_short_way_through_ascii_is_the_pattern_or_none(tables, text):
    data, kinds, start = np.frombuffer(text.encode() or b"a", np.uint8), en._byte_kinds(tables.classes), 0
    while start < len(data):
        stop = en.next_word(data, start, len(data), tables.classes)
        found = en._ascii_word(data, start, len(data), kinds)
        after = len(data) - len(bytes(data[stop:]).lstrip())  # a run of spaces is looked at to its end
        assert found == stop or found == -1 and not bytes(data[start : after + 1]).isascii(), bytes(data[start : after + 1])
        start = stop


@given(words=st.lists(st.binary(min_size=1, max_size=24).map(lambda w: w.replace(b"\x01", b"\x00")), min_size=1, max_size=30))
def test_the_memo_is_a_dictionary(words):
    """Words of all lengths around the limits of a slot, with zeros in them, in a table that is nearly full."""
    memo, known = en.Memo(np.zeros((64, 4), np.uint64), np.zeros(800, np.uint8), np.zeros(200, np.int32), np.zeros(3, np.int64)), {}
    text, out = en._as_text(words), np.zeros(5, np.int32)
    ends = list(itertools.accumulate(map(len, words), initial=0))
    with np.errstate(over="ignore"):
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            key = en._key(text.wide, start, stop)
            slot = en._memo_slot(memo, *key, text.bytes, start, stop)
            assert bool(memo.slots[slot, 2]) == (words[i] in known)
            if words[i] not in known:
                known[words[i]] = np.arange(i, i + 1 + i % 5, dtype=np.int32)
                en._keep(memo, slot, key, text.bytes, start, stop, known[words[i]], len(known[words[i]]))
            count = en._recall(memo, slot, out, 0)
            assert out[:count].tolist() == known[words[i]].tolist()


def test_words_of_one_key_are_told_apart():
    """Zeros of other lengths have the same bytes in a slot; two long words could have the same hash."""
    memo = en.Memo(np.zeros((8, 4), np.uint64), np.zeros(200, np.uint8), np.zeros(20, np.int32), np.zeros(3, np.int64))
    zeros, long = [b"\0" * n for n in (1, 2, 3, 4, 5, 6)], [b"a" * 20, b"a" * 8 + b"b" * 12]
    with np.errstate(over="ignore"):
        for words, key in ((zeros, None), (long, (np.uint64(7), np.uint64(9)))):
            memo.slots[:] = 0
            for word in words:
                text = en._as_text([word])
                own = key or en._key(text.wide, 0, len(word))
                slot = en._memo_slot(memo, *own, text.bytes, 0, len(word))
                assert not memo.slots[slot, 2], word
                en._keep(memo, slot, own, text.bytes, 0, len(word), np.array([1], np.int32), 1)


# Special tokens on the way

spelt = st.lists(st.one_of(texts, st.sampled_from([*SPECIAL_TOKENS, "<", "|im_end|>", "<think", "</s", ">"])), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(spelt, min_size=1, max_size=5), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_special_tokens_stand_in_runs_alone(compiled, batch, cuts):
    """Runs with borders anywhere, also inside the spelling of a special token, and across texts."""
    letters = "".join(batch)
    borders = sorted({min(c, len(letters)) for c in cuts})
    runs = [(a, b) for a, b in zip(borders[::2], borders[1::2])]
    place = [len(letters[:i].encode()) for i in range(len(letters) + 1)]
    ids, offsets = compiled.encode_trusted(batch, np.array([(place[a], place[b]) for a, b in runs], np.int64).reshape(-1, 2))
    begin = 0
    for text, start, end in zip(batch, offsets, offsets[1:]):
        inside = [(max(a - begin, 0), min(b - begin, len(text))) for a, b in runs if a - begin < len(text) and b > begin]
        marks = [0, *(x for pair in inside for x in pair), len(text)]
        pieces = [(text[a:b], k % 2 == 1) for k, (a, b) in enumerate(itertools.pairwise(marks))]
        assert ids[start:end].tolist() == encode_apart(compiled.tokenizer, pieces), pieces
        begin += len(text)


def encode_apart(tokenizer: ChatTokenizer, pieces: Sequence[tuple[str, bool]]) -> list[int]:
    """`encode_pieces`, but no special token stretches over the border of two pieces: the runs of this test touch."""
    ids, waiting = [], ""
    for text, trusted in pieces:
        for k, part in enumerate(tokenizer.special_pattern.split(text) if trusted else [text]):
            if k % 2:
                ids += [*tokenizer.encode(waiting, special=False), tokenizer.special_ids[part]]
            waiting = "" if k % 2 else waiting + part
    return ids + tokenizer.encode(waiting, special=False)


def test_special_tokens_everywhere_are_the_full_tokenizer(compiled):
    r = random.Random(0)
    pieces = [*SPECIAL_TOKENS, "a", " lamp", "\n", "<", "s>", "\u00e9", "[INST", "<<s>"]
    batch = ["".join(r.choices(pieces, k=r.randrange(9))) for _ in range(400)]
    ids, offsets = compiled.encode_trusted(batch)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [TINY.encode(text, special=True) for text in batch]
    assert compiled.recognises and not en.make_encoder(TINY, "tokenizers").recognises


def test_a_long_word_beside_special_tokens_is_left_over(compiled):
    before, long = compiled.left_over, "a" * (en.LONGEST_WORD + 1)
    batch = ["<s>one", f"<s>{long}</s><think>", "two</s>", f"{long}<s>"]
    runs = np.array([[0, 3], [6, 9], [9 + len(long), 20 + 2 * len(long) + 17]])
    ids, offsets = compiled.encode_trusted(batch, runs)
    wanted = [[("<s>", True), ("one", False)], [("<s>", True), (long, False), ("</s><think>", True)], [("two</s>", True)], [(long + "<s>", False)]]
    wanted[3] = [(long, True), ("<s>", True)]
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [TINY.encode_pieces(w) for w in wanted]
    assert compiled.left_over == before + 2


# Words over two letters and merges of any tokens made so far, in any order: ties, overlaps and odd orders are frequent.
two_letters = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=40).map(b"".join)


def some_merges(r: random.Random) -> list[tuple[bytes, bytes]]:
    tokens, merges = [b"a", b"b"], []
    for _ in range(r.randrange(25)):
        pair = r.choice(tokens), r.choice(tokens)
        if pair not in merges and len(pair[0] + pair[1]) <= 8:
            tokens.append(pair[0] + pair[1])
            merges.append(pair)
    return r.sample(merges, len(merges))


def ids_for(merges: Sequence[tuple[bytes, bytes]]) -> dict[bytes, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([b"a", b"b", *(part for pair in merges for part in (*pair, pair[0] + pair[1]))]))}


@settings(max_examples=600)
@given(word=two_letters, seed=st.integers(0, 1 << 30))
def test_merging_with_a_heap_is_merging_by_hand(word, seed):
    merges = some_merges(random.Random(seed))
    ids = ids_for(merges)
    by_hand = [ids[part] for part in en.merge_steps(word, {pair: i for i, pair in enumerate(merges)})[-1]]
    model = models.BPE({token.decode(): i for token, i in ids.items()}, [(a.decode(), b.decode()) for a, b in merges])
    assert Tokenizer(model).encode(word.decode()).ids == by_hand
    triples = np.array([(ids[a], ids[b], ids[a + b]) for a, b in merges], np.int32).reshape(-1, 3)
    byte_ids = np.zeros(256, np.int32)
    byte_ids[[97, 98]] = ids[b"a"], ids[b"b"]
    with np.errstate(over="ignore"):
        scratch, pairs = en._new_scratch(64), en._new_pairs(triples, en._fill_pairs)
        for merge in (en._merge_long, en._merge_short):
            count = merge(np.frombuffer(word, np.uint8), 0, len(word), byte_ids, pairs, scratch)
            assert scratch.ids[:count].tolist() == by_hand, merge


def merged_by_ids(word: bytes, ids: Mapping[bytes, int]) -> list[bytes]:
    """What tiktoken does: among neighbours whose union is an entry, the union of lowest id first."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while found := [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@settings(max_examples=300)
@given(word=two_letters, tokens=st.permutations([b"ab", b"ba", b"aa", b"bb", b"aab", b"aba", b"baa", b"abab", b"aaa", b"aaaa"]), size=st.integers(0, 10), seed=st.integers(0, 99))
def test_merges_that_follow_ids_need_no_list(word, tokens, size, seed):
    """The argument of the notebook: any order of the ids, longer before shorter included, and any order among the ways to one entry."""
    ids = {token: i for i, token in enumerate([b"a", b"b", *tokens[:size]])}
    ways = [(token[:i], token[i:]) for token in ids for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
    r = random.Random(seed)
    merges = sorted(ways, key=lambda way: (ids[way[0] + way[1]], r.random()))
    assert en.merges_follow_ids(ids, merges)
    assert en.merge_steps(word, {pair: i for i, pair in enumerate(merges)})[-1] == merged_by_ids(word, ids)
    assert not merges or not en.merges_follow_ids(ids, merges[1:])
    assert ids[b"".join(merges[0])] == ids[b"".join(merges[-1])] if merges and en.merges_follow_ids(ids, merges[::-1]) else True


# What a tier leaves to others


def test_only_the_segment_with_the_long_word_is_left_over(compiled):
    before = compiled.left_over
    limit = "a" * en.LONGEST_WORD
    assert_same(compiled, ["one", limit, "two three", limit + "a", "", "x " + limit + "b y", "four"])
    assert compiled.left_over == before + 2


def test_only_the_segment_with_the_long_run_is_left_over(tekken_by_tiktoken):
    encoder = tekken_by_tiktoken
    before = encoder.left_over
    assert_same(encoder, ["one", "a " * 5000, "b" * 5000, "", " " * 5000, "four"])
    assert encoder.left_over == before + 2


def test_memo_is_bounded_and_begins_again(compiled):
    backend, r = compiled._backend, random.Random(2)
    slots = len(backend._memo.slots)
    many = ["".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(slots)]
    for _ in range(2):
        assert_same(compiled, [" ".join(many)])
        assert slots * 2 // 3 <= backend._memo.used[0] <= slots * 2 // 3 + 1
    assert_same(compiled, ["the lamp"])
    assert backend._memo.used[0] <= 2


# A tier that would be wrong is not used


def sabotaged(tables: en.Tables, what: str) -> en.Tables:
    classes, merges = tables.classes.copy(), tables.merges.copy()
    if what == "class":
        classes[ord(".")] = classes[ord("a")]
    elif what == "no class":
        classes[ord("7")] = 0
    elif what == "order":
        merges[:200] = merges[199::-1]
    elif what == "union":
        merges[100, 2] = merges[101, 2]
    elif what == "missing":
        merges = np.delete(merges, 100, axis=0)
    return replace(tables, classes=classes, merges=np.ascontiguousarray(merges))


@pytest.mark.parametrize("what, instead", [("class", "tokenizers"), ("order", "words"), ("union", "tokenizers"), ("missing", "words")])
def test_sabotage_is_refused(tables, monkeypatch, what, instead):
    """The tier `words` has no use for merges: wrong ones do it no harm, but wrong classes do."""
    pytest.importorskip("numba")
    monkeypatch.setattr(en, "derive_tables", lambda tokenizer: sabotaged(tables, what))
    with pytest.raises(UserError, match="other ids than" if what != "union" else "the merge of"):
        en.make_encoder(TINY, "numba")
    encoder = en.make_encoder(TINY, num_bytes=LARGE)
    assert encoder.tier == instead and "numba: " in encoder.note and "tiktoken: " in encoder.note
    assert ("words: " in encoder.note) == (instead == "tokenizers")


def test_a_character_without_a_class_cannot_hang(tables, monkeypatch):
    """Such a table gives right ids still, since the segment is left over."""
    pytest.importorskip("numba")
    monkeypatch.setattr(en, "derive_tables", lambda tokenizer: sabotaged(tables, "no class"))
    encoder = en.make_encoder(TINY, "numba")
    assert_same(encoder, ["it is 7", "it is 8"])
    assert encoder.left_over == 1


def test_a_failing_engine_is_refused(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(en, "_new_scratch", lambda longest: 1 / 0)
    with pytest.raises(UserError, match="the trial failed: division by zero"):
        en.make_encoder(TINY, "numba")


def changed(change) -> ChatTokenizer:
    content = json.loads(TINY.full.to_str())
    change(content)
    return chat_tokenizer(Tokenizer.from_str(json.dumps(content)), "changed")


CHANGES = {
    "normalizer": lambda c: c.update(normalizer={"type": "NFC"}),
    "truncation": lambda c: c.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    "padding": lambda c: c.update(padding={"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}),
    "pattern": lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}{1,3}|" + WORDS_PATTERN),
    "behavior": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithPrevious"),
    "prefix space": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "second regex": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "another step": lambda c: c["pre_tokenizer"]["pretokenizers"].append({"type": "Digits", "individual_digits": True}),
    "byte fallback": lambda c: c["model"].update(byte_fallback=True),
    "suffix": lambda c: c["model"].update(end_of_word_suffix="s"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tokenizers_stay_with_their_package(name):
    tokenizer = changed(CHANGES[name])
    encoder = en.make_encoder(tokenizer, num_bytes=LARGE)
    assert encoder.tier == "tokenizers" and "numba: the tokenizer" in encoder.note
    assert_same(encoder, ["some words of 2024", "", "a longer text, of several words, and\n\nlines"])
    with pytest.raises(UserError, match="cannot run: the tokenizer"):
        en.make_encoder(tokenizer, "numba")


def test_whole_words_are_followed_where_the_tokenizer_says_so(tmp_path):
    """`ignore_merges` changes the ids of `tiny` once a merge is missing; the compiled tier follows it either way."""
    pytest.importorskip("numba")
    for whole in (False, True):
        tokenizer = changed(lambda c: (c["model"].update(ignore_merges=whole), c["model"]["merges"].__delitem__(slice(100, 110))))
        encoder = en.make_encoder(tokenizer, "numba")
        assert tokenizer.plain.model.ignore_merges == whole
        assert_same(encoder, [token.replace("Ġ", " ") for token in list(TINY.full.get_vocab())[:500]])


# Choice


def test_auto():
    assert en.make_encoder(TINY).tier == en.make_encoder(TINY, num_bytes=en.AUTO_BYTES - 1).tier == "tokenizers"
    pytest.importorskip("numba")
    encoder = en.make_encoder(TINY, num_bytes=en.AUTO_BYTES)
    assert encoder.tier == "numba" and "same ids" in encoder.note


def test_without_the_optional_packages(tekken, tmp_path_factory, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(UserError, match=r"the package numba cannot be imported(.|\n)*pip install 'nemotron_nb\[fast\]'"):
        en.make_encoder(TINY, "numba")
    pytest.importorskip("tiktoken")
    encoder = en.make_encoder(tekken, num_bytes=LARGE, cache_dir=tmp_path_factory.getbasetemp() / "tables")
    assert encoder.tier == "tiktoken" and "numba cannot be imported" in encoder.note
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encoder = en.make_encoder(TINY, num_bytes=LARGE)
    assert encoder.tier == "words" and "numba" in encoder.note and "tiktoken" in encoder.note


def test_words_are_kept_up_to_a_number_and_a_length(tables, monkeypatch):
    """A full memo begins anew, long words and whole texts are never kept, and the ids are those of the reference."""
    monkeypatch.setattr(en, "_KEPT_WORDS", 40)
    by_words, r = en._ByWords(TINY, tables), random.Random(3)
    for _ in range(60):
        batch = [" ".join(r.choices("the lamp of of in 12 x.y\n".split(" ") + ["é"] * (r.random() < 0.3) + ["ab" * 40, f"w{r.random()}"], k=12)) for _ in range(5)]
        ids, offsets, left = by_words(batch, [])
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [TINY.encode(text, special=False) for text in batch]
        assert not len(left) and len(by_words._memo) < 40 + 200 and max(map(len, by_words._memo), default=0) <= 64


def test_unknown_tier_leads_to_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tiktoken'"):
        en.make_encoder(TINY, "tiktokken")


def test_tiktoken_is_not_offered_where_merges_say_more():
    pytest.importorskip("tiktoken")
    with pytest.raises(UserError, match="not those that tiktoken would make"):
        en.make_encoder(TINY, "tiktoken")


# Kept tables, and other processes


def test_tables_return_from_the_cache(tables, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    assert en.make_encoder(TINY, "numba", cache_dir=tmp_path / "new").note.endswith("tables derived")
    monkeypatch.setattr(en, "derive_tables", None)
    monkeypatch.setattr(en, "first_difference", None)
    encoder = en.make_encoder(TINY, "numba", cache_dir=tmp_path / "new")
    assert encoder.note.endswith("tables read from the cache; tried before on this machine")
    assert_same(encoder, ["the lamp costs 24 euros"])


@pytest.mark.parametrize("what", ["tables", "processor", "package", "tokenizer", "damage"])
def test_a_trial_is_held_again_when_what_it_depends_on_changes(tables, tmp_path, monkeypatch, what):
    pytest.importorskip("numba")
    monkeypatch.setattr(en, "derive_tables", lambda tokenizer: tables)
    held = []
    monkeypatch.setattr(en, "first_difference", lambda encoder, texts: held.append(encoder.tier) or "")
    tokenizer = TINY
    for _ in range(2):
        en.make_encoder(tokenizer, "numba", cache_dir=tmp_path)
    assert held == ["numba"]
    if what == "tables":
        en._write_tables(en._tables_path(TINY, tmp_path), replace(tables, classes=tables.classes[::-1].copy()))
    elif what == "processor":
        monkeypatch.setattr(en, "_machine", lambda tier: [tier, "another"])
    elif what == "package":
        monkeypatch.setattr(en.tokenizers, "__version__", "9.9")
    elif what == "tokenizer":
        tokenizer = changed(lambda c: c["model"].update(ignore_merges=True))
    else:
        en._proof(TINY, "numba", tmp_path).write_text("{")
    encoder = en.make_encoder(tokenizer, "numba", cache_dir=tmp_path)
    assert held == ["numba"] * 2 and "tried before" not in encoder.note


def test_damaged_tables_are_derived_again(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(en, "derive_tables", lambda tokenizer: tables)
    path, r = en._tables_path(TINY, tmp_path), random.Random(3)
    en._write_tables(path, tables)
    good = path.read_bytes()
    places = [0, 63, 64, len(good) - 1, *r.sample(range(len(good)), 6)]
    for bad in (b"", b"\0" * 100, good[:-1], good + b"\0", *(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in places)):
        path.write_bytes(bad)
        again, said = en._tables(TINY, tmp_path)
        assert "derived again" in said and path.read_bytes() == good
        assert all(np.array_equal(getattr(again, f.name), getattr(tables, f.name)) for f in fields(en.Tables))


def test_tables_of_other_tokenizers_have_other_names(tmp_path, monkeypatch):
    other = changed(lambda c: c["model"]["merges"].pop())
    names = {en._tables_path(TINY, tmp_path), en._tables_path(other, tmp_path)}
    monkeypatch.setattr(en.tokenizers, "__version__", "9.9")
    assert len({*names, en._tables_path(TINY, tmp_path)}) == 3


def test_a_cache_that_cannot_be_written_is_said(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(en, "derive_tables", lambda tokenizer: tables)
    (tmp_path / "file").write_text("in the way")
    assert "not cached" in en._tables(TINY, tmp_path / "file")[1]


def test_compiled_without_a_folder_for_machine_code(monkeypatch):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.FunctionCacheImpl if hasattr(caching, "FunctionCacheImpl") else caching.CacheImpl, "_locator_classes", [])
    assert en._compile(_twice)(21) == 42


def _twice(x):
    return 2 * x


def _in_child(encoder, batch, queue):
    queue.put(encoder.encode(batch))


def test_a_forked_process_has_it(encoder):
    context = multiprocessing.get_context("fork")
    queue, batch = context.SimpleQueue(), ["the lamp", "", "costs 24 euros ラ"]
    child = context.Process(target=_in_child, args=(encoder, batch, queue))
    child.start()
    ids, offsets = queue.get()
    child.join()
    assert child.exitcode == 0 and np.array_equal(ids, encoder.encode(batch)[0]) and np.array_equal(offsets, encoder.encode(batch)[1])


def test_it_can_be_pickled(compiled):
    again = pickle.loads(pickle.dumps(compiled))
    assert (again.tier, again.note, again.left_over) == ("numba", compiled.note, 0)
    assert_same(again, ["the lamp", "", "costs 24 euros ラ"])
