"""A tiny model is trained, evaluated against its start, and sent through the budget stage: with the run notebooks, in processes of their own."""

import contextlib
import dataclasses
import html.parser
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from precision import mean_loss_gap

from nemotron_nb.core import UserError, write_json
from nemotron_nb.data.records import Conversation, read_chats
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.template import chunks
from nemotron_nb.ops.config import sft_config, to_yaml
from nemotron_nb.stages.evaluate import (
    HARNESS_TASK,
    HELD_OUT_TASK,
    EvalSection,
    asks,
    changes,
    comparison_sections,
    eval_config,
    evaluate_run,
    form_rows,
    headline,
    open_evaluation,
    resolved,
    score_rows,
    start_measuring,
    write_comparison,
    write_harness,
)
from nemotron_nb.ops.report import html_page
from nemotron_nb.stages.budget import (
    REASONS,
    Prompt,
    budget_config,
    budget_run,
    check_kept,
    collect,
    message_of,
    prompt_of,
    resolved_stage,
    sft_overrides,
    training_prompts,
)
from nemotron_nb.ops.artifacts import Store, log_model
from nemotron_nb.ops.run_folder import follow, read_status
from nemotron_nb.stages.compress import compress_run, write_compression
from nemotron_nb.stages.sft import prepare_data
from nemotron_nb.data.shards import read_packs
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig
from nemotron_nb.train.torch_engine import train
from nemotron_nb.generate.verify import read_questions

ROOT = Path(__file__).parents[1]
HOSTILE = '</td><script>alert(1)</script><img src=x onerror="alert(1)"> \x00 <|im_end|>'
SMALL = ["model.hidden_size=64", "model.expert_size=32", "data.valid_ratio=0.2", "data.test_ratio=0.1", "data.train_ratio=0.7", "loss.stages=[{stage: token}]", "evaluation.num_generations=2", "evaluation.max_new_tokens=24", "train.eval_interval=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a run whose model has learned to say one thing."""
    folder = tmp_path_factory.mktemp("lab")
    said = {"role": "assistant", "reasoning_content": "It is two, as always here, and so I say two.", "content": "It is 2."}
    chats = [{"messages": [{"role": "user", "content": f"What is {i} - {i - 2}?"}, said]} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (folder / "quiz.jsonl").write_text('{"problem": "What is 50 - 48?", "solution": "2", "domain": "easy"}\n{"problem": "What is 5 + 5?", "solution": "10", "domain": "hard"}\nno question\n')
    effective = sft_config("nano3", "tiny", [f"data.path={folder / 'chats.jsonl'}", f"run.output_root={folder / 'output'}", "train.train_iters=25", "train.log_interval=100", *SMALL])
    manifest, run = prepare_data(effective), folder / "output" / "nano3" / "sft" / "20260314T092653Z-tiny-chats-1f0c9a"
    config = effective.settings.training(str(manifest.folder), str(run))
    set_status_done(run, effective, config)
    train(config)
    return folder


def set_status_done(run, effective, config):
    """A run folder as the run notebook leaves it, so far as others read it."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(effective))
    (run / "train.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    write_json(run / "status.json", {"state": "done"})


@pytest.fixture(scope="module")
def run(place):
    return next((place / "output" / "nano3" / "sft").iterdir())


@pytest.fixture(scope="module")
def evaluated(place, run):
    """What was printed, and the folder: the newest run is evaluated, since no model is named."""
    said = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(said):
        folder = evaluate_run("nano3", "tiny", ["data.questions=quiz.jsonl", "data.num_prompts=3", "generation.max_new_tokens=32", "eval.thinking_budget=4"])
    return said.getvalue(), place / folder


def test_an_evaluation_says_what_it_measured(evaluated, run):
    """Model and data by path and digest; the start of the run by its name. Nothing is entered, since nothing was made."""
    lines = json.loads((evaluated[1] / "artifacts.json").read_text())
    assert lines["made"] == []
    found = {line["what"]: line for line in lines["consumed"]}
    assert found["model"]["address"] == str(run / "model") and len(found["model"]["digest"]) == 64
    assert found["base model"]["name"] == f"start:{run}" and found["questions"]["name"] == "quiz.jsonl"
    assert found["data"]["digest"]


def test_an_artifact_is_named_in_the_settings_of_an_evaluation(run, tmp_path):
    """run.model=NAME with `${art:model,path}`: the folder of the version, which the list of what went in names by its address."""
    store = Store(tmp_path / "artifacts")
    entered = log_model(store, "nano3", run, (), "", "sft")
    told = ["run.model=ModelArtifact-sft:latest", "model=${art:model,path}", f"run.artifacts={store.root}", "base=none"]
    config = resolved(eval_config("nano3", "tiny", told).settings)
    assert config.model == str(run / "model") and config.run.model == "ModelArtifact-sft:v1"
    effective = eval_config("nano3", "tiny", told)
    folder = open_evaluation(effective, config, "tiny", str(tmp_path / "measured"))
    consumed = json.loads((folder / "artifacts.json").read_text())["consumed"]
    assert [line["address"] for line in consumed if line["what"] == "model"] == [entered.address]
    with pytest.raises(UserError, match="nothing fills the slot 'model'"):
        eval_config("nano3", "tiny", ["model=${art:model,path}"])


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-evaluation-harness is not installed")
def test_the_harness_finds_the_same_loss(run, tmp_path):
    """lm-evaluation-harness on the exported model, offline, with the files that an evaluation leaves; and the questions for real."""
    told = [f"model={run}", "data.questions=", "data.split=train", "harness.held_out=6", "harness.dtype=float32", "harness.batch_size=2", "eval.modes=[off]"]
    config = resolved(eval_config("nano3", "tiny", told).settings)
    write_harness(config, tmp_path)
    done = subprocess.run(["sh", str(tmp_path / "harness" / "command.sh")], capture_output=True, text=True, timeout=600, env=os.environ | {"HF_DATASETS_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "harness" / "results").rglob("results*.json")).read_text())["results"][HELD_OUT_TASK]["perplexity,none"]
    rows = [json.loads(line) for line in (tmp_path / "harness" / "held_out.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model, sums = build_model(ModelConfig(name=str(run / "model")), 4096).eval(), []
    for row in rows:
        ids, begin = (tokenizer.encode(text, add_special_tokens=False) for text in (row["prompt"] + row["target"], row["prompt"]))
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(-sum(logp[i - 1, ids[i]].item() for i in range(len(begin), len(ids))))
    assert len(rows) == 6 and math.log(found) == pytest.approx(sum(sums) / len(sums), rel=5e-3), "the scan of transformers sums in another order"


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("nemo_evaluator"), reason="NeMo Evaluator is not installed")
def test_nemo_evaluators_own_parser_takes_the_configuration(run, tmp_path):
    """Its models refuse unknown keys; the interceptors are read by its adapter, and a key that is misspelt is refused."""
    from nemo_evaluator.adapters.adapter_config import AdapterConfig
    from nemo_evaluator.api.api_dataclasses import EvaluationConfig, EvaluationTarget
    from nemo_evaluator.core.input import load_run_config

    told = [f"model={run}", "data.questions=", "harness.tasks=[simple_evals.gpqa_diamond]", "harness.url=http://localhost:8000/v1/chat/completions"]
    write_harness(resolved(eval_config("nano3", "tiny", told).settings), tmp_path)
    for mode in ("on", "off"):
        said = load_run_config(str(tmp_path / "harness" / f"nemo_evaluator_simple_evals.gpqa_diamond_{mode}.yaml"))
        config, target = EvaluationConfig(**said["config"]), EvaluationTarget(**said["target"])
        assert (config.type, config.params.parallelism, target.api_endpoint.model_id) == ("simple_evals.gpqa_diamond", 4, "model")
        adapter = AdapterConfig.get_validated_config(said)
        assert [i.name for i in adapter.interceptors] == ["reasoning", "endpoint"] if mode == "on" else True
        with pytest.raises(ValueError, match="paralelism"):
            EvaluationConfig(**said["config"] | {"params": {"paralelism": 4}})


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("modelopt"), reason="ModelOpt is not installed")
def test_a_checkpoint_in_eight_bits(place, run, tmp_path):
    """The whole stage: measured, exported, read back, entered; its page from the folder alone, and its lineage."""
    said = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(said):
        folder = place / compress_run("nano3", "tiny", [f"model={run}", "data.num_prompts=2", "generation.max_new_tokens=8", "calibration.samples=4"])
    counts, results = (json.loads((folder / f"{name}.json").read_text()) for name in ("compressed", "results"))
    assert (counts["weights"], counts["caches"], counts["samples"], counts["never_met"]) == (22, 2, 4, [])
    assert counts["read_back"] == pytest.approx(results["loss"]["tuned"]["all"]["loss_token"], abs=1e-4)
    assert counts["bytes"]["after"] < counts["bytes"]["before"] and "Read back without the tool" in said.getvalue()
    store = Store(place / "output" / "artifacts")
    made = store.get("ModelArtifact-compress")
    assert made.path == folder / "model" and {s.role for s in made.inputs} == {"model", "data"}
    assert read_status(folder)["state"] == "done"
    (folder / "report.html").unlink()
    assert "What keeps which precision" in write_compression(folder).read_text()


def test_what_goes_wrong_while_measuring_is_told_with_its_cause(place, run, tmp_path):
    effective = eval_config("nano3", "tiny", [f"model={run}", f"data.questions={place / 'quiz.jsonl'}"])
    folder = open_evaluation(effective, resolved(effective.settings), "tiny", str(tmp_path / "measured"))
    assert open_evaluation(effective, resolved(effective.settings), "tiny", str(folder)) == folder
    (folder / "eval.yaml").write_text((folder / "eval.yaml").read_text().replace(str(place / "quiz.jsonl"), "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"exit code 1: nowhere\.jsonl: "):
        list(follow(start_measuring(folder)))
    assert "Traceback" not in (folder / "train.log").read_text()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="belongs to another run"):
        open_evaluation(effective, resolved(effective.settings), "tiny", str(folder))


def test_the_newest_run_is_compared_with_its_start(evaluated, run):
    said, folder = evaluated
    results = json.loads((folder / "results.json").read_text())
    assert results["model"] == str(run / "model") and results["base"] == f"start:{run}"
    before, after = (json.loads((run / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    data = Path(yaml.safe_load((run / "train.yaml").read_text())["data_dir"])
    near = mean_loss_gap(build_model(ModelConfig(name=str(run / "model")), 4096), read_packs(data / "splits" / "valid"))
    assert results["loss"]["base"]["all"]["loss_token"] == pytest.approx(before["loss_token"], abs=near), "the start is the very model that the run began with"
    assert results["loss"]["tuned"]["all"]["loss_token"] == pytest.approx(after["loss_token"], abs=near)
    assert results["better"] > 0 and f"{results['better']} turns and answers got better, {results['worse']} got worse" in said
    assert read_status(folder)["state"] == "done"


def test_every_way_of_asking_is_in_the_results(evaluated):
    _, folder = evaluated
    tuned = json.loads((folder / "tuned.json").read_text())
    assert list(dict.fromkeys(w["ask"] for w in tuned["written"])) == ["thinking", "not thinking", "thinking, budget 4"]
    assert all(w["thought_tokens"] <= 4 for w in tuned["written"] if w["ask"] == "thinking, budget 4")
    assert any(w["thought_tokens"] > 4 for w in tuned["written"] if w["ask"] == "thinking")
    assert all("{thinking token budget: 4}" in w["prompt"] for w in tuned["written"] if w["ask"] == "thinking, budget 4")
    assert all(w["prompt"].endswith("<think></think>") for w in tuned["written"] if w["ask"] == "not thinking")


def test_questions_are_judged_and_bad_lines_listed(evaluated):
    _, folder = evaluated
    scores = {(s["asked"], s["domain"], s["model"]): s for s in json.loads((folder / "results.json").read_text())["scores"]}
    easy, hard, everything = (scores["thinking", domain, "tuned"] for domain in ("easy", "hard", "all"))
    assert (easy["hits"], easy["total"], hard["hits"], everything["score"], everything["metric"]) == (1, 1, 0, 0.5, "pass@1"), "it says that it is 2, whatever it is asked"
    assert scores["thinking", "all", "base"]["hits"] == 0
    assert [json.loads(line)["line"] for line in (folder / "rejects.jsonl").read_text().splitlines()] == [3]


class Tags(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_needs_nothing_else(evaluated):
    _, folder = evaluated
    page = (folder / "report.html").read_text()
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    assert all(a["src"].startswith("data:image/png") and a["alt"] for tag, a in tags if tag == "img")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Held-out loss, by source", "Form, by mode", "Questions with an answer", "What got worse, what got better", "Side by side", "Public benchmarks", "Settings", "Code and machine"]


def test_the_page_can_be_drawn_again_from_the_folder(evaluated):
    _, folder = evaluated
    page = (folder / "report.html").read_bytes()
    assert write_comparison(folder).read_bytes() == page
    with pytest.raises(UserError, match="nothing has been measured"):
        write_comparison(folder / "harness")


def test_the_executed_notebook_is_kept_and_says_the_same(evaluated):
    _, folder = evaluated
    notebook = json.loads((folder / "notebook.ipynb").read_text())
    text = "".join("".join(o.get("text", "")) for c in notebook["cells"] for o in c.get("outputs", []))
    assert "turns and answers got better" in text and not any(o["output_type"] == "error" for c in notebook["cells"] for o in c.get("outputs", []))


def test_the_hand_off_has_the_form_of_the_harness(evaluated, run):
    _, folder = evaluated
    harness = folder / "harness"
    task = yaml.safe_load((harness / f"{HARNESS_TASK}.yaml").read_text())
    assert {"task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_target", "metric_list", "filter_list", "generation_kwargs"} <= set(task)
    assert (task["output_type"], task["dataset_path"], task["dataset_kwargs"]["data_files"]["test"]) == ("generate_until", "json", str(harness / "questions.jsonl"))
    rows = [json.loads(line) for line in (harness / "questions.jsonl").read_text().splitlines()]
    assert [(r["problem"], r["solution"]) for r in rows] == [("What is 50 - 48?", "2"), ("What is 5 + 5?", "10")]
    numbers = next(f for f in task["filter_list"] if f["name"] == "last-number")["filter"][0]
    assert re.findall(numbers["regex_pattern"], "5 and then $1,250.75.")[numbers["group_select"]] == "$1,250.75"
    boxes = next(f for f in task["filter_list"] if f["name"] == "boxed")["filter"][0]
    assert re.findall(boxes["regex_pattern"], r"\boxed{3} or \boxed{4}")[boxes["group_select"]] == "4"
    script = (harness / "command.sh").read_text()
    assert subprocess.run(["sh", "-n", harness / "command.sh"]).returncode == 0
    assert [line.split()[0] for line in script.splitlines()[3:]] == ["lm_eval"] * 2 and script.count(f"--tasks {HARNESS_TASK}") == 2 and str(run / "model") in script


def test_whether_the_harness_is_there_is_said(evaluated, monkeypatch):
    _, folder = evaluated
    config = resolved(eval_config("nano3", "tiny", [f"model={json.loads((folder / 'results.json').read_text())['model']}"]).settings)
    for found, said in ((None, "not installed here"), (object(), "is installed")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert said in write_harness(config, folder)


def test_a_dry_run_names_everything_and_writes_nothing(place, run, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert evaluate_run("nano3", "tiny", dry_run=True) is None
    said = capsys.readouterr().out
    assert str(run / "model") in said and f"start:{run}" in said and "papermill_runs/nano3/eval/tiny.yaml" in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("override", "said"), [
    ("eval.modes=[onn]", "did you mean 'on'"), ("eval.verifier=boxd", "did you mean 'boxed'"), ("model=nowhere.json", "no such model"), ("data.questions=chats.jsonl", "no question in the file"), ("data.dir=.", "manifest.json"),
    ("data.split=tset", "no split 'tset'"), ("generation.top_p=0", "top_p"), ("generation.max_new_token=3", "did you mean"), ("eval.num_tests_per_prompt=2", "all be the same"), ("base=chats", "no such model"),
])
def test_what_is_wrong_is_said_before_there_is_a_folder(place, run, evaluated, monkeypatch, override, said):
    monkeypatch.chdir(place)
    folders = sorted((place / "output" / "nano3" / "eval").iterdir())
    with pytest.raises(UserError, match=re.escape(said)):
        evaluate_run("nano3", "tiny", [override])
    assert sorted((place / "output" / "nano3" / "eval").iterdir()) == folders


def test_a_tokenizer_that_is_not_the_models_is_refused(run, tmp_path):
    from nemotron_nb.stages.evaluate import tokenizer_of

    config = resolved(eval_config("nano3", "tiny", [f"model={run}"]).settings)
    data = shutil.copytree(config.data.dir, tmp_path / "data")
    path = data / "tokenizer" / "tokenizer.json"
    changed = json.loads(path.read_text())
    changed["added_tokens"][3]["content"] = "[OTHER]"
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer_of(dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(data))))


# ---- the comparison, from findings that were invented


def found(right, well):
    answers = [{"ask": "thinking", "problem": p, "solution": "4", "domain": "sums", "mode": "on", "test": t, "generated": HOSTILE + str(r), "right": r, "by": "exact", "found": ""} for p, row in right.items() for t, r in enumerate(row)]
    written = [{"ask": "thinking", "conversation_id": c, "source": "s", "mode": "on", "test": 0, "prompt": HOSTILE, "expected": HOSTILE, "generated": HOSTILE, "tokens": 3, "thought_tokens": 1, "reached_budget": False, "closed_think": w, "well_formed_tool_call": None, "ended": True, "called_as_expected": True, "well_formed": w} for c, w in well.items()]
    loss = {"loss_token": 1.5, "loss_sample": 1.25, "trained_tokens": 8, "conversations": 2}
    return {"loss": loss, "sources": {HOSTILE: loss}, "written": written, "answers": answers}


def test_what_fell_is_listed_before_what_rose():
    base, tuned = found({"a": [True, True], "b": [False, False]}, {"c1": True, "c2": False, "c3": True}), found({"a": [True, False], "b": [True, False]}, {"c1": False, "c2": True, "c3": True})
    assert [(c.what, c.better, c.prompt) for c in changes(base, tuned)] == [("answer", False, "a"), ("form", False, HOSTILE), ("answer", True, "b"), ("form", True, HOSTILE)]
    assert [row["hits"] for row in score_rows(base, tuned, 2)] == [2, 2] and [row["score"] for row in score_rows(base, tuned, 2)] == [0.5, 1.0]
    assert [(r["model"], r["well formed"]) for r in form_rows(base, tuned)] == [("base", "67%"), ("tuned", "67%")]
    assert changes({}, tuned) == []


def test_a_models_text_cannot_become_part_of_the_page():
    base, tuned = found({HOSTILE: [True]}, {"c": True}), found({HOSTILE: [False]}, {"c": False})
    config = dataclasses.replace(eval_config("nano3", "tiny").settings, model=HOSTILE)
    page = html_page(HOSTILE, headline(base, tuned, config), comparison_sections(base, tuned, config, HOSTILE))
    tags = Tags(page).found
    assert not any(tag == "script" for tag, _ in tags) and all(a["src"].startswith("data:") and "onerror" not in a for tag, a in tags if tag == "img")
    assert page.count("&lt;script&gt;") > 10


def test_modes_that_yaml_takes_for_booleans_are_words():
    assert eval_config("nano3", "tiny", ["eval.modes=[on, off, low]"]).settings.eval.modes == ["on", "off", "low"]
    assert [a.name for a in asks(EvalSection([False, "low"], thinking_budget=8))] == ["not thinking", "low effort", "low effort, budget 8"]


@pytest.mark.parametrize("family", ["nano3", "super3"])
def test_the_recipes_name_the_modes_of_their_family(family):
    modes = {"nano3": ["on", "off"], "super3": ["on", "off", "low"]}[family]
    assert eval_config(family).settings.eval.modes == eval_config(family, "tiny").settings.eval.modes == modes


def test_no_shipped_question_is_in_the_shipped_chats():
    questions, rejects = read_questions(ROOT / "papermill_runs" / "questions.jsonl")
    said = {m["content"] for c in read_chats(sample_path()) for m in c.messages if m["role"] == "user"}
    assert len(questions) == 24 and not rejects and not said & {q.problem for q in questions}


# ---- the budget stage


def test_every_reference_of_the_sample_becomes_a_chat_again():
    seen = 0
    for chat in read_chats(sample_path()):
        prompt = prompt_of(chat)
        last = chat.messages[-1]
        if prompt is None or last["role"] != "assistant" or not last.get("reasoning_content"):
            continue
        message = message_of(prompt, chunks(chat.messages, chat.tools)[-1].text.removesuffix("\n"))
        assert isinstance(message, dict), message
        assert chunks([*prompt.messages, message], prompt.tools)[-1].text == chunks(chat.messages, chat.tools)[-1].text
        assert all(m.get("train") is False for m in prompt.messages if m["role"] == "assistant")
        seen += 1
    assert seen > 100


CALL = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"


@pytest.mark.parametrize(("generated", "expected"), [
    ("Hm.\n</think>\n4<|im_end|>", {"role": "assistant", "reasoning_content": "Hm.", "content": "4"}),
    (f"Hm.\n</think>\n{CALL}<|im_end|>", {"role": "assistant", "reasoning_content": "Hm.", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "1"}}]}),
    (f"Hm.\n</think>\nLet me see.\n{CALL}{CALL}<|im_end|>", {"role": "assistant", "reasoning_content": "Hm.", "content": "Let me see.", "tool_calls": [{"name": "f", "arguments": {"a": "1"}}] * 2}),
    ("Hm.\n</think>\n4", "not_ended"), ("Hm. 4<|im_end|>", "thought_not_closed"), ("Hm.\n</think>\n</think>\n4<|im_end|>", "thought_not_closed"), ("<think>Hm.\n</think>\n4<|im_end|>", "thought_not_closed"),
    (f"Hm.\n</think>\n{CALL[:-4]}<|im_end|>", "call_unreadable"), ("Hm.\n</think>\n \n<|im_end|>", "no_answer"), ("Hm.</think>4<|im_end|>", "no_answer"),
    ("Hm.\n</think>\n\n4<|im_end|>", "not_reproduced"), ("Hm.\n</think>\n4 <|im_end|>", "not_reproduced"), (" \n</think>\n4<|im_end|>", "not_reproduced"),
])
def test_a_text_is_a_chat_again_or_has_a_reason(generated, expected):
    prompt = Prompt("c", "s", ({"role": "user", "content": "?"},), ())
    found = message_of(prompt, generated)
    assert found == expected and (isinstance(found, dict) or found in REASONS)
    kept, rejects = collect([prompt], [generated])
    assert (len(kept), len(rejects)) == ((1, 0) if isinstance(expected, dict) else (0, 1))


def test_prompts_come_from_the_training_split_alone(run, place, monkeypatch):
    monkeypatch.chdir(place)
    config = resolved_stage(budget_config("super3", "tiny", [f"model={run}"]).settings)
    prompts = training_prompts(config)
    from nemotron_nb.data.shards import read_packs

    folder = Path(resolved(eval_config("nano3", "tiny", [f"model={run}"]).settings).data.dir) / "splits"
    split = {name: {i for p in read_packs(folder / name) for i in p.conversation_ids} for name in ("train", "valid", "test")}
    assert {p.conversation_id for p in prompts} == split["train"] and split["valid"] and not split["valid"] & split["train"]
    again = dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, num_prompts=5))
    assert training_prompts(again) == prompts[:5] != sorted(prompts, key=lambda p: p.messages[0]["content"])[:5]


@pytest.mark.long
def test_the_stage_runs_on_the_tiny_model(run, place, monkeypatch):
    monkeypatch.chdir(place)
    stage = budget_run("super3", "tiny", [f"model={run}", "rollouts.num_prompts=24", "rollouts.min_kept=8", "generation.max_new_tokens=32", "steps=2", "truncate_fraction=0.5", f"sft_overrides=[{', '.join(repr(s) for s in SMALL[2:])}]"])
    counts, rows = json.loads((stage / "rollouts.json").read_text()), [json.loads(line) for line in (stage / "rollouts.jsonl").read_text().splitlines()]
    assert counts["rollouts"] == counts["prompts"] and counts["kept"] == len(rows) >= 8 and sum(counts["rejects"].values()) == counts["prompts"] - len(rows) == len((stage / "rejects.jsonl").read_text().splitlines())
    assert all(isinstance(c, Conversation) for c in read_chats(str(stage / "rollouts.jsonl")))
    trained = Path(read_status(stage)["trained"])
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["rows"] == len(rows) and any("chats cut" in w for w in manifest["warnings"])
    told = yaml.safe_load((trained / "train.yaml").read_text())
    assert told["checkpoint"]["pretrained_checkpoint"] == str(run / "model") and told["train"]["train_iters"] == 2 and (trained / "model" / "config.json").exists()
    before, after = (json.loads((r / f"evaluation_{name}.json").read_text())["loss_token"] for r, name in ((run, "before"), (trained, "before")))
    assert after < before / 2, "the stage begins with the checkpoint's weights and not with random ones"


def test_too_few_healthy_rollouts_end_the_stage_with_their_reasons(tmp_path):
    write_json(tmp_path / "rollouts.json", {"prompts": 9, "rollouts": 9, "kept": 2, "rejects": {"not_ended": 4, "no_answer": 3}})
    with pytest.raises(UserError, match="2 of 9 rollouts are healthy, 3 are needed") as e:
        check_kept(tmp_path, 3)
    assert "4 not_ended, 3 no_answer" in str(e.value) and check_kept(tmp_path, 2)["kept"] == 2


def test_the_stage_is_the_published_one():
    config = dataclasses.replace(budget_config("super3").settings, model="/m")
    effective = sft_config("super3", config.sft, [*sft_overrides(config, Path("/stage")), "data.tokenizer.model=tiny"])
    s = effective.settings
    assert (s.data.reasoning.truncate_fraction, s.data.reasoning.strip_fraction, s.train.train_iters, s.checkpoint.pretrained_checkpoint, s.data.path) == (0.12, 0.0, 350, "/m", "/stage/rollouts.jsonl")
