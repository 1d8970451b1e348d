"""What does W&B's real client get, offline, and does anything that happens to it reach the training?"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wandb_records import read_offline

from nemotron_nb.core import UserError
from nemotron_nb.ops import tracking
from nemotron_nb.ops.artifacts import Source, Store
from nemotron_nb.ops.tracking import LoggerSection, Tracker, choose_mode, hidden, merged, numbers

KEY = "0123456789abcdef0123456789abcdef01234567"  # nobody's
OFFLINE = LoggerSection(wandb_project="nemotron", wandb_mode="offline")
LINES = [{"kind": "train", "step": n, "stage": "token", "loss": 2.0 / n, "lr": 1e-5} for n in range(1, 6)]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A home of its own, no W&B variables, and an empty folder to stand in."""
    for name in [n for n in os.environ if n.startswith("WANDB_") or n == "NETRC"]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def client(alone):
    """The real client; its helper process ends with the test."""
    wandb = pytest.importorskip("wandb")
    yield wandb
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def registered(root):
    """Two artifacts: data, and a model made from it. The folder has a space in its name."""
    store = Store(root / "register")
    for name, text in (("packs", "data"), ("model", "weights")):
        (root / f"the {name}").mkdir()
        (root / f"the {name}" / "content.bin").write_text(text)
    data = store.log("DataBlendsArtifact-sft", "data", root / "the packs", {"pack_size": 8}, [Source("chats.jsonl", "chats", "", "d" * 64)])
    return data, store.log("ModelArtifact-sft", "model", root / "the model", {"iteration": 5}, [data], aliases=("latest", "nano3"))


def everything_under(folder):
    return b"\n".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


# The real client


def test_metrics_settings_and_both_artifacts_are_there_and_no_secret_is(client, alone, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    data, model = registered(alone)
    before, said = dict(os.environ), []
    config = {"optimizer": {"lr": 1e-5}, "model": {"name": "https://user:hf_very_secret@hub/x"}}
    env = {"entity": "team", "tags": ["chats"], "notes": "a try"}
    with Tracker.open(alone / "my-run", OFFLINE, env, config, consumed=[data], say=said.append) as tracker:
        for line in [{"kind": "start", "steps": 5, "tokenizer": "tiny"}, *LINES, {"kind": "valid", "step": 5, "loss_token": 0.5}]:
            tracker.log(line)
        tracker.summary({"evaluation/passed": 0.75})
        tracker.artifact(data)
        tracker.artifact(model)
    os.environ.pop("WANDB_SERVICE", None)  # where the client's helper listens
    assert dict(os.environ) == before and tracker.failures == 0
    assert len(said) == 1 and "wandb sync" in said[0]
    (run,) = read_offline(alone / "my-run")
    assert (run["project"], run["name"], run["tags"], run["job_type"], run["exit"]) == ("nemotron", "my-run", ["chats"], "sft", 0)
    assert run["history"] == [{"train/loss": 2.0 / n, "train/lr": 1e-5, "step": n} for n in range(1, 6)] + [{"valid/loss_token": 0.5, "step": 5}]
    assert run["config"]["optimizer"] == {"lr": 1e-5} and run["config"]["model"] == {"name": "(hidden)"}
    assert run["config"]["inputs"] == [{"name": data.name, "role": "data", "uri": data.address, "digest": data.digest}]
    assert run["summary"]["evaluation/passed"] == 0.75 and run["summary"]["start/steps"] == 5 and run["summary"]["state"] == "done"
    assert set(run["artifacts"]) == {data.name, model.name}
    seen = run["artifacts"][model.name]
    assert seen["type"] == "model" and seen["metadata"]["digest"] == model.digest and seen["metadata"]["inputs"][0]["digest"] == data.digest
    assert seen["metadata"]["iteration"] == 5 and set(seen["aliases"]) == {"latest", "nano3", f"sha-{model.digest[:12]}"}
    assert list(seen["references"]) == ["content.bin"] and seen["references"]["content.bin"].startswith("file://")
    written = everything_under(alone)
    assert KEY.encode() not in written and b"hf_very_secret" not in written
    assert not list((alone / "home").rglob("*")) and not list((alone / "cwd").rglob("*"))


def test_another_model_in_the_same_folder_is_another_version_there(client, alone):
    """References say where, not what: the digest has to be a file of the artifact."""
    store, folder, digests = Store(alone / "register"), alone / "model", []
    folder.mkdir()
    for text in ("first", "other"):
        (folder / "weights.bin").write_text(text)
        with Tracker.open(alone / text, OFFLINE, say=lambda text: None) as tracker:
            tracker.artifact(store.log("m", "model", folder))
        digests.append(read_offline(alone / text)[0]["artifacts"]["m"]["digest"])
    assert digests[0] != digests[1]


def test_files_are_sent_only_on_demand(client, alone):
    data, model = registered(alone)
    with Tracker.open(alone / "run", OFFLINE, say=lambda text: None) as tracker:
        tracker.artifact(model, upload=True)
    seen = read_offline(alone / "run")[0]["artifacts"][model.name]
    assert seen["references"] == {} and "content.bin" in seen["files"]


def test_a_run_that_goes_on_is_the_same_run_and_sends_no_step_twice(client, alone):
    with Tracker.open(alone / "run", OFFLINE, say=lambda text: None) as tracker:
        for line in LINES[:3]:
            tracker.log(line)
        tracker.close("preempted")
    with Tracker.open(alone / "run", OFFLINE, say=lambda text: None) as tracker:
        for line in [*LINES[:3], {"kind": "resume", "step": 2, "attempt": 2}, *LINES[2:]]:
            tracker.log(line)
    first, second = read_offline(alone / "run")
    assert first["id"] == second["id"] and (first["preempting"], first["exit"], second["exit"]) == (True, 1, 0)
    assert [h["step"] for h in first["history"] + second["history"] if "train/loss" in h] == [1, 2, 3, 4, 5]
    assert {"resume/attempt": 2, "step": 2} in second["history"]


def test_a_network_that_never_answers_makes_the_run_offline(client, alone, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        said = []
        with Tracker.open(alone / "run", LoggerSection("nemotron"), say=said.append, patience=1) as tracker:
            assert tracker.mode == "offline"
            tracker.log(LINES[0])
    assert "starting online failed, the run goes on" in said[0] and "recorded offline" in said[1]
    assert [h["step"] for h in read_offline(alone / "run")[0]["history"]] == [1]
    assert KEY.encode() not in everything_under(alone) and not any(KEY in text for text in said)


def test_a_client_whose_helper_is_killed_is_left_alone(client, alone):
    said = []
    before = children()
    tracker = Tracker.open(alone / "run", OFFLINE, say=said.append, patience=1)
    for helper in children() - before:
        os.kill(helper, signal.SIGKILL)
    for step in range(1, 200):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.close("failed")
    assert tracker.failures >= 1 and sum("failed, the run goes on" in text for text in said) == 1 and len(said) <= 3


def children():
    """The processes that this one started."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


# Without it


@pytest.mark.parametrize(
    "chosen, installed, said",
    [(LoggerSection(), True, "no project is named"), (LoggerSection("p"), True, "there is no API key"), (LoggerSection("p", wandb_mode="online"), True, "there is no API key"), (OFFLINE, False, "not installed"), (LoggerSection("p", wandb_mode="disabled"), True, "switched off")],
)
def test_without_project_key_or_package_one_line_is_said_and_nothing_written(alone, monkeypatch, chosen, installed, said):
    if not installed:
        monkeypatch.setitem(sys.modules, "wandb", None)
    lines = []
    with Tracker.open(alone / "run", chosen, say=lines.append) as tracker:
        tracker.log(LINES[0])
        tracker.summary({"a": 1})
        tracker.artifact(registered(alone)[1])
    assert len(lines) == 1 and said in lines[0] and "stays local" in lines[0]
    assert tracker.mode == "local" and tracker.failures == 0 and not (alone / "run").exists()


def test_a_package_that_does_not_import_is_an_error_of_wandb_not_of_the_run(alone, monkeypatch):
    (alone / "broken" / "wandb").mkdir(parents=True)
    (alone / "broken" / "wandb" / "__init__.py").write_text("raise RuntimeError('built for another Python')")
    code = f"""
from nemotron_nb.ops.tracking import LoggerSection, Tracker
with Tracker.open({str(alone / "run")!r}, LoggerSection("p", wandb_mode="offline")) as tracker:
    tracker.log({{"kind": "train", "step": 1, "loss": 1.0}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{alone / 'broken'}:{Path(tracking.__file__).parents[2]}"})
    assert done.returncode == 0, done.stderr
    assert "built for another Python" in done.stdout and "stays local" in done.stdout


def test_the_module_is_imported_without_the_package():
    code = "import sys; sys.modules['wandb'] = None; import nemotron_nb.ops.tracking"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# What would be sent online


def stand_in(calls, fails=()):
    """A client that writes down what it is asked, and fails where it is told to."""

    def called(name):
        def call(*arguments, **options):
            calls.append((name, arguments, options))
            if name in fails:
                raise ConnectionError(f"no answer to {KEY}")

        return call

    names = ("log", "use_artifact", "log_artifact", "mark_preempting", "finish")
    return SimpleNamespace(url="https://wandb.example/run", summary=SimpleNamespace(update=called("summary")), **{n: called(n) for n in names})


def test_online_the_consumed_artifacts_are_used(alone, monkeypatch):
    calls, data = [], registered(alone)[0]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "_start", lambda facts, mode, patience: stand_in(calls))
    monkeypatch.setattr(tracking, "_wandb_artifact", lambda artifact, upload: (artifact.address, upload))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: True)
    tracker = Tracker.open(alone / "run", LoggerSection("p"), consumed=[data, Source("tiny", "base model")], say=lambda text: None)
    tracker.close("preempted")
    assert [c[0] for c in calls] == ["use_artifact", "summary", "mark_preempting", "finish"] and calls[0][1] == ((data.address, False),)


def test_errors_are_counted_said_once_and_end_after_ten_in_a_row(alone, monkeypatch):
    calls, said = [], []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = Tracker(alone, said.append)
    tracker._run = stand_in(calls, fails=["log"])
    for step in range(30):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    assert len(calls) == tracker.failures == 10 and len(said) == 2
    assert "(hidden)" in said[0] and KEY not in said[0] and "nothing more is sent" in said[1]


def test_an_error_now_and_then_ends_nothing(alone):
    calls, tracker = [], Tracker(alone, lambda text: None)
    tracker._run = stand_in(calls, fails=["log"])
    for step in range(30):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
        tracker.summary({"a": step})
    assert tracker.failures == 30 and tracker._run is not None


# Words

any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


WORDS = st.sampled_from(["", "a", "b", "c"])


@any_speed
@given(WORDS, WORDS, WORDS)
def test_settings_come_before_the_file_and_the_file_before_variables(setting, file, variable):
    found, _ = merged(LoggerSection(wandb_project=setting, wandb_exp_name=setting), {"project": file, "run_name": file}, {"WANDB_PROJECT": variable, "WANDB_NAME": variable})
    assert found.wandb_project == found.wandb_exp_name == (setting or file or variable)


@pytest.mark.parametrize("variable, mode", [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("nonsense", "auto"), ("", "auto")])
def test_the_mode_of_the_environment_counts_where_none_is_set(variable, mode):
    assert merged(LoggerSection(), {}, {"WANDB_MODE": variable})[0].wandb_mode == mode
    assert merged(LoggerSection(wandb_mode="online"), {}, {"WANDB_MODE": variable})[0].wandb_mode == "online"


def test_unknown_words_are_refused():
    with pytest.raises(UserError, match="did you mean 'entity'"):
        Tracker.open("nowhere", env={"entitiy": "x"})


def test_a_key_in_the_file_of_wandb_login_is_found(alone):
    (alone / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert choose_mode(LoggerSection("p"), os.environ, True)[0] == "online"
    assert choose_mode(LoggerSection("p"), os.environ | {"WANDB_BASE_URL": "https://elsewhere.org"}, True)[0] == "local"


def test_settings_that_json_has_no_form_for_are_sent_as_text():
    assert hidden({"a": [Path("x")], "b": Source("n"), 3: None}, {}) == {"a": ["x"], "b": {"name": "n", "role": "file", "uri": "", "digest": ""}, "3": None}


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)


@any_speed
@given(st.dictionaries(st.sampled_from(["kind", "step", "loss", "lr", "stage", "ok"]), JSON))
@example({"kind": "train", "loss": float("nan"), "lr": float("inf"), "ok": True})
def test_only_finite_numbers_are_sent(line):
    found = numbers(line)
    assert all(type(v) in (int, float) and v == v and abs(v) != float("inf") for v in found.values())
    assert len(found) == sum(type(v) in (int, float) and v == v and abs(v) != float("inf") for k, v in line.items() if k != "step")


def texts(value):
    """Every text that stands as a value somewhere in a tree."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


@any_speed
@given(JSON, st.text(alphabet="abc\"\\é", min_size=8, max_size=10))
def test_no_secret_is_left_in_settings(value, secret):
    tree = {"a": value, "b": [f"x{secret}y", {"c": secret}], "d": 1}
    left = hidden(tree, {"MY_API_KEY": secret, "HOME": "/home/x"})
    assert not any(secret in text for text in texts(left))
    assert left["d"] == 1 and left["b"] == ["(hidden)", {"c": "(hidden)"}]
