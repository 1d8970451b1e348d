"""Does the register lose, mix up or believe anything, whoever writes at once, is killed, or tampers?"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemotron_nb.core import UserError, write_json
from nemotron_nb.ops import artifacts
from nemotron_nb.ops.artifacts import Address, Source, Store, art_resolver, content, log_model, open_store, parse_address, source

FORK = multiprocessing.get_context("fork")
any_speed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
NAMES = st.text(alphabet="abcXY01 ._-é", min_size=1, max_size=12).filter(lambda n: n not in (".", "..") and n.strip())
TREES = st.dictionaries(NAMES, st.one_of(st.binary(max_size=50), st.dictionaries(NAMES, st.binary(max_size=50), max_size=3)), min_size=1, max_size=5)


def write_tree(folder, tree):
    folder.mkdir(parents=True)
    for name, value in tree.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        else:
            write_tree(folder / name, value)


def plain(folder):
    """The digest of a folder, the slow way."""
    rows = [[p.relative_to(folder).as_posix(), p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in folder.rglob("*") if p.is_file()]
    return hashlib.sha256(json.dumps(sorted(rows), ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def made(folder, text):
    """A folder with one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_text(text)
    return folder


@contextmanager
def somewhere():
    with tempfile.TemporaryDirectory() as d:
        yield Path(d)


# Names


@any_speed
@given(st.one_of(st.text(max_size=20), st.text(alphabet="./\\:v1a~$\n\0", max_size=12)))
def test_no_address_leads_out_of_the_register(text):
    try:
        address = parse_address(text)
    except UserError:
        return
    root = Path("/register")
    for word in (address.name, address.version):
        assert (root / word).parent == root and os.path.normpath(root / word) == str(root / word) and not word.startswith(".")
    assert parse_address(str(address)) == address


@any_speed
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))
def test_every_address_is_read_as_it_was_written(name, version):
    assert parse_address(f"art://{name}:{version}") == parse_address(f"{name}:{version}") == Address(name, version)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a:b", "a\n", "x" * 200])
def test_hostile_names_are_refused_before_anything_is_written(tmp_path, name):
    store = Store(tmp_path / "register")
    for call in (lambda: store.log(name, "model", made(tmp_path / "m", "x")), lambda: store.get(f"art://{name}"), lambda: store.log("m", "model", tmp_path / "m", aliases=[name])):
        with pytest.raises(UserError):
            call()
    assert not (tmp_path / "register").exists()


@pytest.mark.parametrize("said", ["../../other", "v1/../..", "", "v99", "/etc"])
def test_an_alias_that_was_written_by_hand_leads_nowhere(tmp_path, said):
    store = Store(tmp_path / "register")
    store.log("m", "model", made(tmp_path / "m", "x"))
    (tmp_path / "register" / "m" / "latest").write_text(said)
    with pytest.raises(UserError, match="there is no artifact m:latest"):
        store.get("m")


# Digests


@any_speed
@given(TREES, st.randoms())
def test_the_digest_is_that_of_the_plain_way_and_of_nothing_else(tree, random):
    with somewhere() as d:
        write_tree(d / "one", tree)
        if not any(p.is_file() for p in (d / "one").rglob("*")):
            return
        items = list(tree.items())
        random.shuffle(items)
        write_tree(d / "elsewhere" / "two", dict(items))
        for p in (d / "elsewhere").rglob("*"):
            os.utime(p, (random.randrange(10**9), 1))
        assert content(d / "one").digest == content(d / "elsewhere" / "two").digest == plain(d / "one")


@any_speed
@given(TREES, st.sampled_from(["change", "delete", "add", "rename"]), st.data())
def test_every_tampering_is_named(tree, how, data):
    with somewhere() as d:
        write_tree(d / "m", tree)
        files = [p for p in (d / "m").rglob("*") if p.is_file()]
        if len(files) < 2:
            return
        store = Store(d / "register")
        store.log("m", "model", d / "m")
        store.verify("m")
        victim = data.draw(st.sampled_from(files))
        stamp = victim.stat()
        if how == "change":
            old = victim.read_bytes()
            victim.write_bytes(bytes([old[0] ^ 1]) + old[1:] if old else b"x")
            os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        elif how == "delete":
            victim.unlink()
        elif how == "add":
            victim = victim.with_name("added by hand")
            victim.write_bytes(b"")
        else:
            victim.rename(victim.with_name("moved by hand"))
        with pytest.raises(UserError) as e:
            store.verify("m")
        assert victim.relative_to(d / "m").as_posix() in str(e.value)


def test_what_cannot_be_read_twice_the_same_is_refused(tmp_path, monkeypatch):
    folder = made(tmp_path / "m", "x")
    for name, make, said in [
        ("loop", lambda p: p.symlink_to(tmp_path), "is a link to a folder"),
        ("dangling", lambda p: p.symlink_to(tmp_path / "nothing"), "is a link to nothing"),
        ("pipe", os.mkfifo, "is no file"),
        (os.fsdecode(b"\xff\xfe"), lambda p: p.write_text("x"), "not UTF-8"),
    ]:
        make(folder / name)
        with pytest.raises(UserError, match=said):
            content(folder)
        (folder / name).unlink()
    with pytest.raises(UserError, match="is not there"):
        content(tmp_path / "nothing")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no files"):
        content(tmp_path / "empty")
    real = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda p, n: (real(p, n), Path(p).write_text("longer"))[0])
    with pytest.raises(UserError, match="changed while it was read"):
        content(folder)


def test_a_link_to_a_file_counts_as_the_file(tmp_path):
    made(tmp_path / "blobs", "x")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights.bin").symlink_to(tmp_path / "blobs" / "weights.bin")
    assert content(tmp_path / "m").digest == content(tmp_path / "blobs").digest


# Versions


def test_known_files_are_not_read_again_but_verified_in_full(tmp_path, monkeypatch):
    store, folder = Store(tmp_path / "register"), made(tmp_path / "m", "first")
    (folder / "big.bin").write_text("big")
    store.log("m", "model", folder)
    read = []
    real = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda p, n: (read.append(Path(p).name), real(p, n))[1])
    assert "2 of 2 files known" in store.log("m", "model", folder).note and read == []
    (folder / "weights.bin").write_text("other")
    os.utime(folder / "weights.bin", (1, 1))
    second = store.log("m", "model", folder)
    assert second.version == "v2" and read == ["weights.bin"] and "1 of 2 files known" in second.note
    read.clear()
    store.verify("m:v2")
    assert sorted(read) == ["big.bin", "weights.bin"]


def test_what_makes_a_version(tmp_path):
    """The same bytes, inputs and metadata are the same version, unless its folder is gone."""
    store = Store(tmp_path / "register")
    one, two = made(tmp_path / "one", "x"), made(tmp_path / "two", "x")
    chats = made(tmp_path / "chats", "hello")
    assert store.log("m", "model", one, {"n": 1}, [source(chats)]).version == "v1"
    assert store.log("m", "model", two, {"n": 1}, [source(chats)]).version == "v1"
    assert store.log("m", "model", two, {"n": 2}, [source(chats)]).version == "v2"
    assert store.log("m", "model", two, {"n": 1}, []).version == "v3"
    assert store.log("m", "model", made(tmp_path / "three", "y"), {"n": 1}, [source(chats)]).version == "v4"
    shutil.rmtree(one)
    again = store.log("m", "model", two, {"n": 1}, [source(chats)])
    assert (again.version, again.path) == ("v5", two)
    with pytest.raises(UserError, match="is not there"):
        store.verify("m:v1")


def test_latest_means_what_was_logged_last_and_a_tag_means_what_it_was_told(tmp_path):
    store = Store(tmp_path / "register")
    store.log("m", "model", made(tmp_path / "a", "a"), aliases=("latest", "nano3"))
    store.log("m", "model", made(tmp_path / "b", "b"))
    assert (store.get("m").version, store.get("m:nano3").version) == ("v2", "v1")
    store.log("m", "model", tmp_path / "a")
    assert store.get("m").version == "v1"
    store.tag("m:v2", "best")
    assert store.get("art://m:best").aliases == ("best",)
    with pytest.raises(UserError, match="looks like a version"):
        store.tag("m", "v7")


def test_what_does_not_exist_is_answered_with_what_does(tmp_path):
    store = Store(tmp_path / "register")
    with pytest.raises(UserError, match="the register is empty"):
        store.get("m")
    store.log("ModelArtifact-sft", "model", made(tmp_path / "a", "a"))
    with pytest.raises(UserError, match="did you mean 'ModelArtifact-sft'.*v1"):
        store.get("ModelArtifact-sfd")
    with pytest.raises(UserError, match="there are v1, latest"):
        store.get("ModelArtifact-sft:v2")
    with pytest.raises(UserError, match="there is no artifact nothing"):
        store.log("m", "model", tmp_path / "a", inputs=["art://nothing:v1"])
    assert not (tmp_path / "register" / "m").exists()


def test_a_damaged_record_harms_nobody_else(tmp_path):
    store = Store(tmp_path / "register")
    for text in "abc":
        store.log("m", "model", made(tmp_path / text, text))
    (tmp_path / "register" / "m" / "v2" / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="the register is damaged here"):
        store.get("m:v2")
    assert [a.version for a in store.list()] == ["v1", "v3"]
    assert "m:v2" in store.overview().text and "damaged record" in store.overview().text
    assert store.log("m", "model", made(tmp_path / "d", "d")).version == "v4"


def test_a_changed_list_of_digests_is_noticed(tmp_path):
    store, folder = Store(tmp_path / "register"), made(tmp_path / "m", "x")
    store.log("m", "model", folder)
    (folder / "weights.bin").write_text("y")
    files = tmp_path / "register" / "m" / "v1" / "files.json"
    rows = json.loads(files.read_text())
    rows["weights.bin"] |= {"sha256": hashlib.sha256(b"y").hexdigest()}
    files.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="the register itself was changed"):
        store.verify("m")


def test_a_register_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the register cannot be written"):
        Store(tmp_path / "file" / "register").log("m", "model", made(tmp_path / "m", "x"))


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": {1, 2}}, {"a": Path("x")}])
def test_metadata_is_json_or_refused(tmp_path, metadata):
    with pytest.raises(UserError, match="cannot be written as JSON"):
        Store(tmp_path / "register").log("m", "model", made(tmp_path / "m", "x"), metadata)


# Many at once, and killed at any moment


def whole(root):
    """Every version that can be seen is whole, and every alias means one of them."""
    for folder in root.glob("*/v*"):
        assert {p.name for p in folder.iterdir()} == {"manifest.json", "metadata.json", "files.json"}, folder
        record = json.loads((folder / "manifest.json").read_text())
        assert (record["name"], record["version"]) == (folder.parent.name, folder.name)
    for artifact in Store(root).list():
        Store(root).verify(artifact)
    for alias in root.glob("*/latest"):
        assert (alias.parent / alias.read_text().strip()).is_dir()


def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks available")


def write_some(root, number, start, locks):
    """One of twenty: three artifacts of its own, and one that all of them write."""
    if not locks:
        fcntl.flock = no_locks
    store = Store(root / "register")
    start.wait()
    for k in range(3):
        store.log("m", "model", root / f"{number}-{k}", {"writer": number, "k": k})
    store.log("m", "model", root / "shared")


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "a disk without locks"])
def test_twenty_writers_lose_nothing(tmp_path, locks):
    """Without locks two of them may enter the artifact that all of them write at the same moment, each under its own version."""
    made(tmp_path / "shared", "shared")
    for number in range(20):
        for k in range(3):
            made(tmp_path / f"{number}-{k}", f"{number} {k}")
    start = FORK.Barrier(20)
    writers = [FORK.Process(target=write_some, args=(tmp_path, number, start, locks)) for number in range(20)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
    assert [w.exitcode for w in writers] == [0] * 20
    found = Store(tmp_path / "register").list()
    shared = sum("writer" not in a.metadata for a in found)
    assert sorted(int(a.version[1:]) for a in found) == list(range(1, 61 + shared))
    assert {(a.metadata["writer"], a.metadata["k"]) for a in found if "writer" in a.metadata} == {(n, k) for n in range(20) for k in range(3)}
    assert shared == 1 if locks else 1 <= shared <= 20
    whole(tmp_path / "register")
    assert not list((tmp_path / "register" / "m").glob(".*.tmp"))


def die_at(moment, root):
    """Log an artifact, and be killed just before the `moment`-th call that changes the disk."""
    calls = iter(range(1, 1000))

    def deadly(real):
        def call(*arguments, **options):
            if next(calls) == moment:
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "replace", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    Store(root / "register").log("m", "model", root / "new", {"n": 1})


def test_killed_at_any_moment_nothing_half_is_seen(tmp_path):
    made(tmp_path / "old", "old")
    made(tmp_path / "new", "new")
    seen = set()
    for moment in range(1, 100):
        shutil.rmtree(tmp_path / "register", ignore_errors=True)
        store = Store(tmp_path / "register")
        store.log("m", "model", tmp_path / "old")
        child = FORK.Process(target=die_at, args=(moment, tmp_path))
        child.start()
        child.join(30)
        whole(tmp_path / "register")
        seen.add(len(store.list()))
        assert store.get("m").version in ("v1", "v2")
        assert store.log("m", "model", tmp_path / "new", {"n": 1}).version == "v2" == store.get("m").version
        assert not list((tmp_path / "register" / "m").glob(".*.tmp")), "the next writer removes what the killed one left"
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
    assert moment > 8 and seen == {1, 2}


# Lineage


def family(tmp_path):
    """Chats, data, a first model, and one trained from both."""
    store = Store(tmp_path / "register")
    chats = source(made(tmp_path / "chats", "hello") / "weights.bin", "chats")
    data = store.log("DataBlendsArtifact-sft", "data", made(tmp_path / "data", "packs"), {"pack_size": 8}, [chats], producer={"command": "nemotron nano3 data prep sft"})
    base = store.log("ModelArtifact-pretrain", "model", made(tmp_path / "base", "base"), inputs=[chats])
    model = store.log("ModelArtifact-sft", "model", made(tmp_path / "sft", "sft"), {"iteration": 7}, [data, base], producer={"command": "nemotron nano3 sft", "commit": "abc", "dirty": True})
    return store, data, base, model


def test_from_the_model_to_the_chats(tmp_path):
    store, data, base, model = family(tmp_path)
    tree = store.lineage("ModelArtifact-sft")
    lines = tree.text.splitlines()
    assert [line.lstrip("├└│─ ").split()[0] for line in lines] == ["ModelArtifact-sft:v1", "DataBlendsArtifact-sft:v1", "weights.bin", "ModelArtifact-pretrain:v1", "weights.bin"]
    assert "commit abc and changes" in lines[0] and hashlib.sha256(b"hello").hexdigest()[:12] in lines[2]
    assert [a.name for a in store.consumers(data)] == ["ModelArtifact-sft"]
    boxes = artifacts._boxes(tree)
    assert sum(not b.key.startswith("command") for b in boxes.values()) == 4  # the chats are one box, though they went into two
    rows = artifacts._rows(boxes, model.address)
    assert all(rows[feed] > rows[box.key] for box in boxes.values() for feed in box.feeds)
    picture = tree.picture()
    assert picture.png[:4] == b"\x89PNG" and "ModelArtifact-sft:v1 comes from DataBlendsArtifact-sft:v1 and ModelArtifact-pretrain:v1" in picture.text


def test_an_input_that_was_replaced_or_removed_is_said(tmp_path):
    store, data, base, model = family(tmp_path)
    path = tmp_path / "register" / "DataBlendsArtifact-sft" / "v1" / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"digest": "f" * 64})
    shutil.rmtree(tmp_path / "register" / "ModelArtifact-pretrain")
    text = store.lineage(model).text
    assert f"PROBLEM: the register now has ffffffffffff, consumed was {data.digest[:12]}" in text
    assert "PROBLEM: there is no artifact ModelArtifact-pretrain:v1" in text
    assert store.lineage(model).picture().png


def test_a_record_that_names_itself_comes_to_an_end(tmp_path):
    store, data, base, model = family(tmp_path)
    path = tmp_path / "register" / "ModelArtifact-pretrain" / "v1" / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"inputs": [vars(Source("ModelArtifact-sft", "model", model.address, model.digest))]})
    tree = store.lineage(model)
    assert "(as above)" in tree.text and tree.picture().png


def test_a_ladder_of_shared_inputs_is_followed_once(tmp_path):
    """Thirty steps with two ways each have a thousand million paths."""
    store = Store(tmp_path / "register")
    before = []
    for n in range(30):
        pair = [store.log(f"{side}{n}", "model", made(tmp_path / f"{side}{n}", f"{side}{n}"), inputs=before) for side in "ab"]
        before = [p.address for p in pair]
    assert len(list(store.lineage("a29").nodes())) == 59


@pytest.mark.parametrize("name", ["$\\frac{", "<script>alert(1)</script>", "line\nbreak\x1b[31m", "日本", "x" * 500, ""])
def test_hostile_words_are_only_words(tmp_path, name):
    store = Store(tmp_path / "register")
    store.log("m", "model", made(tmp_path / "m", "x"), inputs=[Source(name, name, name, name)], producer={"command": name})
    tree = store.lineage("m")
    assert len(tree.text.splitlines()) == 2 and "\x1b" not in tree.text
    picture = tree.picture()
    assert picture.png and "<script" not in picture.html and "\x1b" not in picture.text


# In a configuration


def test_a_configuration_asks_for_fields(tmp_path):
    store, data, base, model = family(tmp_path)
    resolve = art_resolver(store, {"data": "DataBlendsArtifact-sft", "model": ""})
    OmegaConf.register_new_resolver("art", resolve, replace=True)
    asked = OmegaConf.create({"path": "${art:data,path}", "size": "${art:data,pack_size}", "bad": "${art:data,packsize}", "none": "${art:model,path}"})
    assert (asked.path, asked.size) == (str(tmp_path / "data"), 8)
    for name, said in (("bad", "did you mean 'pack_size'"), ("none", "say run.model=NAME:VERSION")):
        with pytest.raises(Exception, match=said):
            asked[name]


def test_the_model_of_a_run(tmp_path):
    store, run = Store(tmp_path / "register"), tmp_path / "run"
    made(run / "model", "weights")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 4}\n{"kind": "train", "step": 5}\n{"kind": "valid", "step": 9}\n{"ki')
    write_json(run / "env.json", {"git": {"commit": "abc", "dirty": False}})
    model = log_model(store, "super3", run, [], "nemotron super3 sft")
    assert model.name == "ModelArtifact-sft" and model.field("iteration") == 5 and model.producer["commit"] == "abc"
    assert store.get("ModelArtifact-sft:super3") == store.get("ModelArtifact-sft:latest")


def test_where_the_register_is(tmp_path):
    assert open_store(None, tmp_path).root == tmp_path / "artifacts"
    assert open_store({"root": "~/x", "backend": "wandb"}).root == Path.home() / "x"
