"""The whole recipe: a journal that survives being killed, refusals in words, a report card from stored runs, and the way for real."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import NEMOTRON, ONE_THREAD
from omegaconf import OmegaConf
from run_folders import HOSTILE
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError, file_digest, write_json
from nemotron_nb.ops.artifacts import Store, log_data
from nemotron_nb.ops.config import RunSection
from nemotron_nb.stages.evaluate import EvalConfig, from_register
from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.stages.recipe import (
    Asked,
    Measure,
    Recipe,
    RecipeStep,
    card_of,
    check_recipe,
    do_step,
    load_recipe,
    made_for,
    open_recipe,
    read_journal,
    recipe_run,
    run_of,
    run_recipe,
    take_step,
    write_card,
)

STEPS = ("pretrain", "synth", "sft", "dpo", "rl", "eval", "compress")


def stand_in(asked, resume="", die=lambda where: None):
    """A run that does nothing but leave what a real one leaves; `die` is called at each place where it may be killed."""
    name = asked.step.name
    run = Path(resume) if resume else asked.step.row.root(asked.output_root, asked.family) / f"2026-{name}-{time.time_ns()}"
    die(f"{name} before its folder")
    if asked.step.pipeline:
        do_step(asked)  # rows are made for real: that takes no time
        return die(f"{name} done")
    run.mkdir(parents=True, exist_ok=True)
    OmegaConf.save({"family": asked.family, "run": {"label": asked.label}}, run / "config.yaml")
    write_json(run / "status.json", {"state": "running", "pid": os.getpid(), "host": os.uname().nodename, "attempts": []})
    die(f"{name} inside")
    told = [{"name": a, "what": "model", "address": a, "digest": ""} for a in asked.filled.values() if a.startswith("art://")]
    made = [{"name": "m", "what": "model", "address": f"art://{name}:v1", "digest": ""}] if asked.step.row.makes else []
    data = [{"name": "d", "what": "data", "address": f"art://{name}-data:v1", "digest": ""}]
    write_json(run / "artifacts.json", {"consumed": [*told, *data], "made": made})
    write_json(run / "status.json", {"state": "done", "attempts": []})
    die(f"{name} done")


def silent(text):
    """Nothing is told."""


def rows_and_tuning(root, **more):
    """The steps that make rows and that tune on a blend with them, and the journal's entry of the rows, which are made."""
    _, rows, tuning, *_ = load_recipe("nano3", "tiny", ["synth.rows=12"]).steps
    recipe, folder = Recipe("nano3", (rows,)), root / "nano3/recipe/rows"
    return tuning, run_recipe(recipe, folder, str(root), do_step, silent)["done"], folder


def end_of(folder):
    """What a recipe came to, without the names of its run folders: state, model, data, and what each step consumed."""
    done = read_journal(folder)["done"]
    notes = {n: Path(e["run"]) / "artifacts.json" for n, e in done.items()}
    consumed = {n: json.loads(p.read_text())["consumed"] if p.is_file() else file_digest(p.parent / "rows.jsonl") for n, p in notes.items()}
    return {n: (e["model"], e["data"], consumed[n]) for n, e in done.items()}


def killed_at(place, recipe, root):
    """Do a recipe in a process that is killed with SIGKILL at a place; how it ended."""

    def die(where):
        if where == place:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            run_recipe(recipe, root / "nano3/recipe/tiny", str(root), lambda a, r: stand_in(a, r, die), silent)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["pretrain before its folder", "synth before its folder", "synth done", "sft inside", "rl done", "eval inside"])
def test_killed_anywhere_it_comes_to_the_same_end(tmp_path, place):
    """SIGKILL between steps, inside one, and between the end of a run and the journal; the same call again goes on."""
    tiny = load_recipe("nano3", "tiny")
    whole = tmp_path / "whole"
    run_recipe(tiny, whole / "nano3/recipe/tiny", str(whole), stand_in, silent)
    root, calls = tmp_path / "killed", []
    assert killed_at(place, tiny, root) == -signal.SIGKILL
    folder = root / "nano3/recipe/tiny"
    before = read_journal(folder)["done"]

    def again(asked, resume):
        calls.append((asked.step.name, bool(resume)))
        stand_in(asked, resume)

    run_recipe(tiny, folder, str(root), again, silent)
    assert end_of(folder) == end_of(whole / "nano3/recipe/tiny")
    assert list(read_journal(folder)["done"]) == list(STEPS)
    name, _, where = place.partition(" ")
    assert name not in before and not {step for step, _ in calls} & set(before), "what was done is passed over"
    # inside: resumed, but for the evaluation, which begins again; done but not noted: found, and not done again
    assert dict(calls).get(name) == {"before its folder": False, "inside": name != "eval", "done": None}[where]


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    """The label has the id of the journal in it: with the folder gone, old runs of that name do not count."""
    tiny, folder = load_recipe("nano3", "tiny"), tmp_path / "nano3/recipe/tiny"
    run_recipe(tiny, folder, str(tmp_path), stand_in, silent)
    folder.rename(tmp_path / "away")
    seen = []
    run_recipe(tiny, folder, str(tmp_path), lambda a, r: (seen.append(a.step.name), stand_in(a, r)), silent)
    assert seen == [name for name in STEPS if name != "synth"], "rows are found by their content, whoever made them"


def test_a_done_run_that_was_taken_away_is_missed(tmp_path):
    """The journal says done and the folder is gone: refused, and nothing is begun behind anybody's back."""
    tiny, folder = load_recipe("nano3", "tiny"), tmp_path / "nano3/recipe/tiny"
    run_recipe(tiny, folder, str(tmp_path), stand_in, silent)
    run = Path(read_journal(folder)["done"]["sft"]["run"])
    run.rename(tmp_path / "away")
    with pytest.raises(UserError, match="the run of a step that was done is gone"):
        run_recipe(tiny, folder, str(tmp_path), stand_in, silent)


def test_a_run_that_somebody_follows_is_left_alone(tmp_path):
    """A step whose run is alive is neither begun again nor resumed, and a second process is refused."""
    tiny, folder = load_recipe("nano3", "tiny"), tmp_path / "nano3/recipe/tiny"

    def followed(asked, resume):
        stand_in(asked, resume)
        write_json(run_of(asked) / "status.json", {"state": "running", "pid": os.getpid(), "host": os.uname().nodename})
        with pytest.raises(UserError, match="somebody runs the step pretrain"):
            take_step(asked, stand_in, silent, patience=0)
        with pytest.raises(UserError, match="another process is at this recipe"):
            run_recipe(tiny, folder, str(tmp_path), stand_in, silent)

    with pytest.raises(UserError, match="the step pretrain is running"):
        run_recipe(tiny, folder, str(tmp_path), followed, silent)


def test_made_rows_are_blended_by_their_address_and_stay_in_the_lineage(tmp_path):
    """The blend names the file of the registered rows; data prepared from it leads back to the pipeline."""
    tuning, done, folder = rows_and_tuning(tmp_path)
    assert done["synth"]["data"] == "art://SynthArtifact-tool_world:v1" and done["synth"]["model"] == ""
    filled = made_for(tuning, done, folder, "nano3", str(tmp_path))
    parts = json.loads(Path(filled["data.blend_path"]).read_text())["datasets"]
    assert [(p["name"], p["weight"], p["license"]) for p in parts] == [("careless", 19, "Apache-2.0"), ("tool_world", 1, "Apache-2.0")]
    manifest = prepare(PrepConfig(blend_path=filled["data.blend_path"], output_dir=str(tmp_path / "data"), sample=10, pack_size=2048, workers=1))
    store = Store(tmp_path / "artifacts")
    data = log_data(store, "nano3", manifest.folder, filled["data.blend_path"])
    assert "SynthArtifact-tool_world:v1" in store.lineage(data).text and "tool_world  pipeline" in store.lineage(data).text


def test_rows_that_were_changed_are_not_trained_on(tmp_path):
    """One byte more in the file of rows: refused when the blend is written; rows that nobody made are missed."""
    tuning, done, folder = rows_and_tuning(tmp_path)
    with pytest.raises(UserError, match="synth is not done"):
        made_for(tuning, {}, folder, "nano3", str(tmp_path))
    with open(Path(done["synth"]["run"]) / "rows.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="rows.jsonl"):
        made_for(tuning, done, folder, "nano3", str(tmp_path))


def test_rows_that_were_begun_are_gone_on_with(tmp_path):
    """A folder of rows that is not in the register is not taken for done."""
    tuning, done, folder = rows_and_tuning(tmp_path)
    rows = Path(done["synth"]["run"])
    (tmp_path / "artifacts").rename(tmp_path / "away")
    step = load_recipe("nano3", "tiny", ["synth.rows=12"]).steps[1]
    told = []
    assert take_step(Asked("nano3", step, "again", {}, str(tmp_path)), do_step, told.append) == rows
    assert "goes on, it was stopped" in told[0] and (tmp_path / "artifacts").is_dir()


def test_an_optional_step_is_left_out_where_its_package_is_missing(tmp_path, monkeypatch):
    """The others are done, the card says why; with the package there, the same call does it."""
    tiny, folder = load_recipe("nano3", "tiny"), tmp_path / "nano3/recipe/tiny"
    told = []
    with monkeypatch.context() as patched:
        patched.setattr("nemotron_nb.stages.recipe.missing_package", lambda step: "modelopt" if step.row.packages else "")
        run_recipe(tiny, folder, str(tmp_path), stand_in, told.append)
    assert list(read_journal(folder)["done"]) == list(STEPS[:-1]) and told[-1] == "step compress: left out, modelopt is not installed"
    assert card_of(folder)["steps"][-1]["state"] == "left out: modelopt is not installed"
    assert "compress: left out: modelopt is not installed." in write_card(folder, str(tmp_path)).with_suffix(".txt").read_text()
    monkeypatch.setattr("nemotron_nb.stages.recipe.missing_package", lambda step: "")
    run_recipe(tiny, folder, str(tmp_path), stand_in, silent)
    assert list(read_journal(folder)["done"]) == list(STEPS) and card_of(folder)["steps"][-1]["state"] == "done"


def test_a_journal_from_before_a_setting_existed_is_still_read(tmp_path):
    """Steps without the keys that came later mean their defaults."""
    old = Recipe("nano3", (RecipeStep("base", "pretrain", ["tiny"]),))
    open_recipe(old, tmp_path / "recipe")
    path = tmp_path / "recipe" / "journal.json"
    journal = json.loads(path.read_text())
    for key in ("pipeline", "blend", "optional"):
        del journal["steps"][0][key]
    path.write_text(json.dumps(journal))
    assert open_recipe(old, tmp_path / "recipe") == journal


def test_other_steps_in_the_same_folder_are_refused(tmp_path):
    """Another setting, another order, another family: the first difference is said, and nothing is run."""
    tiny, folder = load_recipe("nano3", "tiny"), tmp_path / "recipe"
    open_recipe(tiny, folder)
    before = (folder / "journal.json").read_bytes()
    for other, said in (
        (load_recipe("nano3", "tiny", ["rl.grpo.seed=1"]), r"settings of the step rl was \[\], and asked for is \['grpo.seed=1'\]"),
        (Recipe("nano3", tiny.steps[:3]), "it was begun with nano3 pretrain, synth, sft, dpo, rl, eval, compress"),
        (Recipe("super3", tiny.steps), "asked for is super3"),
    ):
        with pytest.raises(UserError, match=said):
            run_recipe(other, folder, str(tmp_path), stand_in, silent)
    assert (folder / "journal.json").read_bytes() == before
    (folder / "journal.json").write_text("{}")
    with pytest.raises(UserError, match="the journal cannot be read: something is missing"):
        open_recipe(tiny, folder)


def test_steps_that_cannot_follow_each_other_are_refused(tmp_path):
    """A file that is wrong is refused with its place, before there is a folder."""
    base = RecipeStep("base", "pretrain", ["tiny"])
    for steps, said in (
        ([], "a recipe without steps"),
        ([RecipeStep("a b", "sft")], "taken or not plain"),
        ([RecipeStep("cut", "budget")], "nano3 has no stage 'budget'"),
        ([base, RecipeStep("t", "sft", takes={"run.model": "bas"})], "did you mean 'base'"),
        ([base, RecipeStep("t", "sft", blend={"base": 1})], "blends 'base'"),
        ([RecipeStep("rows", "synth", pipeline="sql"), RecipeStep("t", "sft", takes={"run.model": "rows"})], "makes no model"),
        ([RecipeStep("rows", "synth")], "one of stage synth and a pipeline"),
        ([RecipeStep("rows", "synth", pipeline="sqll")], "did you mean 'sql'"),
        ([base, RecipeStep("t", "sft", takes={"run.model": "base.weights"})], "take STEP or STEP.data"),
        ([RecipeStep("look", "eval"), RecipeStep("t", "sft", takes={"run.model": "look"})], "makes no model"),
    ):
        with pytest.raises(UserError, match=said):
            check_recipe(Recipe("nano3", tuple(steps)), "mine.yaml")
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: [{name: a, stage: sft, model: b}]\n")
    with pytest.raises(UserError, match="unknown setting 'model'"):
        load_recipe("nano3", str(mine))
    mine.write_text("steps: 3\n")
    with pytest.raises(UserError, match="no list of steps"):
        load_recipe("nano3", str(mine))


def test_a_misspelt_setting_of_a_late_step_is_refused_before_the_first(tmp_path):
    """Nobody waits for a pretraining to hear of a misspelt setting of the evaluation."""
    with pytest.raises(UserError, match="did you mean 'data.num_prompts'"):
        recipe_run("nano3", "tiny", ["eval.data.num_prompt=3"], output_root=str(tmp_path), do=stand_in)
    with pytest.raises(UserError, match="steps that need a cluster: pretrain: 32 nodes"):
        recipe_run("nano3", "default", output_root=str(tmp_path), do=stand_in)
    assert not list(tmp_path.iterdir())


def test_the_dry_run_names_every_step_and_makes_nothing(tmp_path, monkeypatch):
    """Commands, what each consumes and makes; no folder."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["nano3", "recipe", "-c", "tiny", "--dry-run", "sft.train.train_iters=7"])
    assert done.exit_code == 0, done.output
    for words in ("nemotron nano3 sft -c tiny ", "train.train_iters=7", "'data.blend_path=<careless + synth>'", "nemotron synth tool_world -c tiny rows=60", "SynthArtifact-tool_world", "ModelArtifact-compress", "'run.model=<sft>'", "ModelArtifact-rl", "a comparison"):
        assert words in done.output
    assert not list(tmp_path.iterdir())


def measured(root, gain):
    """A recipe of stand-ins whose runs hold measurements; with `gain` each step bought something."""
    folder = root / "nano3/recipe/tiny"
    run_recipe(load_recipe("nano3", "tiny"), folder, str(root), stand_in, silent)
    runs = {name: Path(entry["run"]) for name, entry in read_journal(folder)["done"].items()}
    for name in ("pretrain", "sft"):
        for when, loss in (("before", 8.0), ("after", 2.0 if gain else 8.0)):
            values = {"loss_token": loss, "well_formed_rate": 0.5, "num_generations": 12}
            write_json(runs[name] / f"evaluation_{when}.json", values)
    lines = [{"kind": "rl_valid", "step": s, "reward": r, "rewards": {HOSTILE: r, "sum": 0.5 - r / 2}} for s, r in ((0, 0.2), (9, 0.8 if gain else 0.1))]
    (runs["rl"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    form = [{"asked": HOSTILE, "model": who, "turns": 40, "well formed": share} for who, share in (("base", "0%"), ("tuned", "100%"))]
    loss = {"base": {"all": {"loss_token": 1.0}}, "tuned": {"all": {"loss_token": 1.5}}}
    write_json(runs["eval"] / "results.json", {"loss": loss, "form": form, "scores": []})
    started, ended = "2026-01-01T00:00:00Z", "2026-01-01T00:01:30Z"
    write_json(runs["sft"] / "status.json", {"state": "done", "attempts": [{"started": started, "ended": ended}, {"started": ended}]})
    return folder, card_of(folder)


def test_the_card_says_what_was_bought_and_what_was_not(tmp_path):
    """Verdicts of stored runs: a gain, none, one that was paid for elsewhere, and chance."""
    _, card = measured(tmp_path / "gain", True)
    said = {step["step"]: step["verdict"] for step in card["steps"]}
    assert said["pretrain"] == said["sft"] == "bought: held-out loss (nats a token)"
    assert said["rl"] == "bought: held-out reward; paid with: reward: sum"
    assert said["synth"].startswith("made 5") and said["synth"].endswith("of 60 rows (tool_world); licence: Apache-2.0")
    assert said["dpo"] == "nothing was measured" and said["eval"] == "1 better, 1 worse, 0 unchanged"
    sft = card["steps"][2]
    assert (sft["seconds"], sft["model"]) == (90.0, "art://sft:v1")
    _, card = measured(tmp_path / "none", False)
    said = {step["step"]: step["verdict"] for step in card["steps"]}
    assert said["sft"] == "BOUGHT NOTHING: held-out loss (nats a token), no change"
    assert said["rl"] == f"BOUGHT NOTHING: held-out reward is worse; also worse: reward: {HOSTILE}"
    assert Measure("rate", 0.5, 0.75, "higher", 12).verdict == "no change"
    assert Measure("rate", 0.5, 0.75, "higher", 400).verdict == "better"


def test_the_page_escapes_what_runs_say_and_a_second_drawing_is_the_same(tmp_path):
    """Names from run folders are text on the page; the card is made of the folders alone."""
    folder, card = measured(tmp_path, True)
    page = write_card(folder, str(tmp_path))
    text, first = page.read_text(), [(folder / f"card.{kind}").read_bytes() for kind in ("html", "txt", "json")]
    assert HOSTILE not in text and "&lt;script&gt;" in text and "<script" not in text
    assert "BOUGHT" not in text and "art://" not in text.split("<h2>")[1]
    write_card(folder, str(tmp_path))
    assert first == [(folder / f"card.{kind}").read_bytes() for kind in ("html", "txt", "json")]
    stored = json.loads((folder / "card.json").read_text())
    assert stored["steps"] == card["steps"]


def test_an_evaluation_takes_models_by_their_address(tmp_path):
    """art://NAME:VERSION is the folder of that version, verified; changed bytes are refused."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    store = Store(tmp_path / "artifacts")
    store.log("ModelArtifact-rl", "model", model, {}, [])
    run = RunSection(artifacts=str(store.root))
    asked = EvalConfig(model="art://ModelArtifact-rl:v1", base="none", run=run)
    settled = from_register(asked)
    assert (settled.model, settled.base) == (str(model), "none")
    (model / "config.json").write_text("{ }")
    with pytest.raises(UserError):
        from_register(asked)


SHORT = [
    *("pretrain.train.train_iters=3", "pretrain.train.eval_interval=0", "pretrain.scheduler.lr_wsd_decay_iters=1"),
    *("pretrain.scheduler.lr_warmup_iters=1", "pretrain.data.world_megabytes=0.1", "pretrain.evaluation.num_generations=2"),
    *("pretrain.evaluation.max_new_tokens=4", "pretrain.evaluation.needle_lengths=[64]", "pretrain.data.workers=1"),
    *("sft.train.train_iters=3", "sft.loss.stages=[{stage: token}]", "sft.train.eval_interval=0", "sft.data.sample=60"),
    *("sft.evaluation.num_generations=2", "sft.evaluation.max_new_tokens=6", "sft.scheduler.lr_warmup_iters=1"),
    *("rl.grpo.max_num_steps=2", "rl.grpo.num_prompts_per_step=3", "rl.grpo.num_generations_per_prompt=2"),
    *("rl.grpo.max_new_tokens=8", "rl.validation.generations=2", "rl.data.sample_tasks=12", "rl.data.val_rows=4"),
    *("dpo.dpo.max_num_steps=2", "dpo.dpo.solutions=2", "dpo.grpo.max_new_tokens=8", "dpo.validation.generations=2"),
    *("dpo.data.sample_tasks=12", "dpo.data.val_rows=4"),
    *("synth.rows=8", "eval.data.num_prompts=2", "eval.data.questions=", "eval.generation.max_new_tokens=4"),
    *("compress.calibration.samples=4", "compress.data.num_prompts=1", "compress.generation.max_new_tokens=4"),
]


@pytest.mark.long
def test_the_whole_way_for_real(tmp_path):
    """Every stage with very few steps, stopped in the middle of fine-tuning by SIGTERM, and gone on with by the same words."""
    pairs = tmp_path / "pairs.jsonl"  # a model of three steps has no right answers to make pairs of
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"{n + 1}"} for n in range(16)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [NEMOTRON, "nano3", "recipe", "-c", "tiny", *SHORT, f"dpo.dpo.pairs={pairs}"]
    log = open(tmp_path / "first.log", "wb")
    first = subprocess.Popen(words, cwd=tmp_path, env=ONE_THREAD, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 300
    while not list(tmp_path.glob("output/nano3/sft/*/train.log")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    first.wait(timeout=300)
    said = (tmp_path / "first.log").read_text()
    assert "sft" in said and first.returncode != 0, said
    folder = tmp_path / "output/nano3/recipe/tiny"
    assert list(read_journal(folder)["done"]) == ["pretrain", "synth"]
    done = subprocess.run(words, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step pretrain: done before" in done.stdout and "Report card:" in done.stdout
    card = json.loads((folder / "card.json").read_text())
    assert [step["state"] for step in card["steps"]] == ["done"] * 7
    assert all(step["measures"] for step in card["steps"] if step["step"] not in ("synth", "dpo"))
    for name in ("ModelArtifact-compress:v1", "ModelArtifact-rl:v2", "ModelArtifact-sft:v1", "SynthArtifact-tool_world:v1", "ModelArtifact-pretrain:v1"):
        assert name in card["lineage"], card["lineage"]
    run = {step["step"]: Path(step["run"]) for step in card["steps"]}
    assert OmegaConf.load(run["eval"] / "eval.yaml").model == str(run["rl"] / "model")
    again = subprocess.run(words, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("done before") == 7
