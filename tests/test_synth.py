"""Making rows: the same bytes after any kill, alone or beside others; what falls is told; a file is judged again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.filters import check as filter_chat
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.endpoint import EndpointError
from nemotron_nb.rehearsal import Reply, rehearsal
from nemotron_nb.stages.synth import synth_config
from nemotron_nb.synth import ask, pipelines, produce, sql, verify_sql
from nemotron_nb.synth.journal import Journal
from nemotron_nb.synth.pipelines import pipeline_named
from nemotron_nb.synth.row import PASSED, RowDraft
from nemotron_nb.synth.steps import Fallen, Workshop, make_row

SQL = pipelines.PIPELINES["sql"]


@pytest.fixture(scope="module")
def rows():
    """Two hundred finished rows of the pipeline sql."""
    workshop = Workshop(sql.SqlSettings())
    made = (make_row("sql", sql.STEPS, workshop, i, "recipe") for i in range(10**6))
    found = []
    while len(found) < 200:
        row = next(made)
        found += [] if isinstance(row, Fallen) else [json.loads(json.dumps(row))]
    return found


def test_right_queries_pass(rows):
    assert all(proof.status == PASSED for row in rows for proof in sql.judge_sql(row))


def test_a_row_asks_each_database_once(monkeypatch):
    """The database, its six variations, its rows in another order, its tables without distractors."""
    asked, kept = [], 0
    monkeypatch.setattr(verify_sql, "_opened", lambda data, opened=verify_sql._opened: asked.append(data) or opened(data))
    for index in range(20):
        asked.clear()
        kept += not isinstance(make_row("sql", sql.STEPS, Workshop(sql.SqlSettings()), index, "recipe"), Fallen)
        assert len(asked) == len(set(asked)) == 9
    assert kept >= 15


CHANGES = [
    ("COUNT(*)", "COUNT(*) + 1"), ("COUNT(*)", "COUNT(DISTINCT f.kind)"), (" DESC", " ASC"), (">= ", "> "), ("NOT EXISTS", "EXISTS"),
    ("SUM(", "MAX("), ("AVG(", "MIN("), ("f.kind = '", "f.kind <> '"), ("LIMIT 2", "LIMIT 3"), ("LIMIT 3", "LIMIT 2"), ("= '2022'", "= '2023'"),
    ("= '2023'", "= '2024'"), ("= '2024'", "= '2022'"), ("LEFT JOIN", "JOIN"), ("place = 1", "place = 2"), ("THEN 1 ELSE 0", "THEN 0 ELSE 1"),
]  # fmt: skip


def test_wrong_queries_are_refused(rows):
    """Every planted change is found, but for those that cannot matter in any of the seven databases of the row."""
    planted = caught = 0
    for row in rows:
        query = verify_sql.query_of(row["messages"][-1]["content"])
        data = verify_sql.SqlData.of_json(row["synth"]["check"]["data"])
        for old, new in CHANGES:
            if old not in query:
                continue
            wrong = query.replace(old, new)
            ordered = row["synth"]["check"]["ordered"]
            if all(_same(each, query, wrong, ordered) for each in (data, *verify_sql.variations(data))):
                continue  # the same answer wherever it is asked: no verifier that runs could tell
            planted += 1
            spoilt = json.loads(json.dumps(row))
            spoilt["messages"][-1]["content"] = f"```sql\n{wrong}\n```"
            caught += any(proof.status != PASSED for proof in sql.judge_sql(spoilt))
    assert planted > 300 and caught == planted


def _same(data, first, second, ordered):
    answers = []
    for query in (first, second):
        try:
            answers.append(verify_sql.run_query(data, query, ordered))
        except verify_sql.QueryError as error:
            answers.append(error.reason)
    return answers[0] == answers[1]


def test_rows_are_chats_that_preparation_and_filters_take(rows):
    for row in rows:
        chat = parse_conversation(row)
        assert not chat.repairs and filter_chat(chat) is None, row["id"]


def test_a_row_that_is_made_alone_is_the_same(tmp_path):
    made = produce.produce(SQL, sql.SqlSettings(rows=30), tmp_path / "a")
    kept = {row["synth"]["index"]: row for row in map(json.loads, open(tmp_path / "a/rows.jsonl"))}
    index = random.Random(0).choice(sorted(kept))
    assert make_row("sql", sql.STEPS, Workshop(sql.SqlSettings()), index, made.manifest["recipe"]) == kept[index]


def test_killed_at_random_and_with_two_workers(tmp_path):
    """SIGKILL to the whole group, again and again; the same bytes as one worker that nobody disturbs."""
    program = f"""
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.produce import produce
from nemotron_nb.synth.sql import SqlSettings
if __name__ == "__main__":
    produce(PIPELINES["sql"], SqlSettings(rows=160, workers=2), {str(tmp_path / "killed")!r})
"""
    (tmp_path / "program.py").write_text(program)
    rng, kills = random.Random(3), 0
    journal = tmp_path / "killed/journal"
    while True:
        process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], start_new_session=True)
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and kills < 3:
            if journal.exists() and journal.stat().st_size > before + rng.randint(1, 60_000):
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    assert kills
    produce.produce(SQL, sql.SqlSettings(rows=160), tmp_path / "quiet")
    for name in ("rows.jsonl", "drops.jsonl", "manifest.json"):
        killed, quiet = ((tmp_path / where / name).read_bytes() for where in ("killed", "quiet"))
        assert killed.replace(b'"workers": 2', b'"workers": 1') == quiet, name


def test_one_process_works_in_a_folder(tmp_path):
    journal = Journal(tmp_path / "journal", produce.recipe_of(SQL, sql.SqlSettings(rows=3)))
    journal.close()
    with produce.locked(tmp_path / ".lock"), pytest.raises(UserError, match="another process"):
        code = "import sys; from nemotron_nb.core import locked\nwith locked(sys.argv[1]) as l: print(l is None)"
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True).stdout == b"True\n"
        produce.produce(SQL, sql.SqlSettings(rows=3), tmp_path)


def test_a_damaged_journal_loses_the_damaged_end_alone(tmp_path):
    rng = random.Random(1)
    for _ in range(100):
        path = tmp_path / f"journal{rng.random()}"
        journal = Journal(path, "r")
        for i in range(10):
            journal.add(i, {"row": {"text": "x" * rng.randint(0, 50)}})
        journal.close()
        data = bytearray(path.read_bytes())
        place = rng.randrange(data.index(b"\n") + 1, len(data))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        whole = bytes(data[:place]).count(b"\n") - 1
        journal = Journal(path, "r")
        assert len(journal) == whole and journal.cut == len(data) - path.stat().st_size
        journal.close()


# A pipeline that asks, for a server that fails on purpose.
def _ask(draft, workshop):
    draft.answer = workshop.models.ask(draft, "teacher", "ask", f"question {draft.index}", {"type": "integer"}).text
    draft.messages = [{"role": "user", "content": f"question {draft.index}"}, {"role": "assistant", "content": draft.answer}]


STEPS = (("ask", _ask),)
judge = teacher = None
Settings = ask.AskingSettings


def asked(script, folder, cache_dir="", **settings):
    teacher = ask.ModelSection(ask.REHEARSAL, retries=1, concurrency=4, cache_dir=cache_dir)
    this = sys.modules[__name__]
    this.teacher = script
    pipeline = produce.Pipeline("asked", "", "", __name__, "Settings", "judge", teacher="teacher")
    return produce.produce(pipeline, ask.AskingSettings(rows=20, max_drop_share=1.0, teacher=teacher, **settings), folder)


BAD = {
    "html": Reply(raw=b"<html>busy</html>"),
    "no choices": Reply(raw=b'{"choices": []}'),
    "a list": Reply(raw=b'{"choices": [{"message": {"content": ["a"]}}]}'),
    "half": Reply(raw=b'{"choices": [{"mess'),
    "words": Reply("forty-two"),
    "nan": Reply("NaN"),
    "two": Reply("1 2"),
    "cut": Reply(None, reasoning="Hm.", finish_reason="length"),
    "filtered": Reply("1", finish_reason="content_filter"),
    "refused": Reply(status=400),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=list(BAD))
def test_bad_answers_drop_their_row_and_are_told(reply, tmp_path):
    made = asked(lambda body, before: reply if "question 3" == body["messages"][0]["content"] else "7", tmp_path)
    assert made.funnel.kept == 19
    fell = json.loads((tmp_path / "drops.jsonl").read_text())
    assert fell["index"] == 3 and fell["step"] == "ask" and fell["reason"].startswith("teacher_")
    if reply.content and reply.status == 200 and reply.raw is None and reply.finish_reason == "stop":
        assert fell["raw"] == reply.content


def test_a_server_that_goes_away_stops_the_run_and_nothing_is_lost(tmp_path):
    gone = [False]

    def script(body, before):
        number = int(body["messages"][0]["content"].split()[1])
        gone[0] = gone[0] or number == 12
        return Reply(status=503) if gone[0] else "7"

    with pytest.raises(EndpointError, match="503"):
        asked(script, tmp_path)
    done = (tmp_path / "journal").read_bytes().count(b"\n") - 1
    assert 0 < done < 20
    questions = []
    made = asked(lambda body, before: questions.append(body) or "7", tmp_path)
    assert made.funnel.kept == 20 and len(questions) == made.made_now == 20 - done


def _count(body, before):
    COUNTED.append(body)
    return "7"


COUNTED = []


def test_a_rehearsed_run_that_is_made_again_asks_nothing(tmp_path):
    """The port is another one; the script is the same."""
    for name, questions in (("first", 20), ("second", 0)):
        COUNTED.clear()
        made = asked(_count, tmp_path / name, cache_dir=str(tmp_path / "answers"))
        assert (made.funnel.kept, made.made_now, len(COUNTED)) == (20, 20, questions)
    assert (tmp_path / "first/rows.jsonl").read_bytes() == (tmp_path / "second/rows.jsonl").read_bytes()
    cost = json.loads((tmp_path / "second/cost.json").read_text())
    assert (cost["requests"], cost["from_disk"]) == (0, 20)
    COUNTED.clear()
    asked(lambda body, before: _count(body, before), tmp_path / "third", cache_dir=str(tmp_path / "answers"))
    assert len(COUNTED) == 20  # another script: its answers are its own


def test_a_script_that_was_edited_is_another_one(tmp_path):
    names = []
    for answer in ("7", "8", "7"):
        (tmp_path / "script.py").write_text(f"def teacher(body, before):\n    return {answer!r}\n")
        known = {}
        exec(compile((tmp_path / "script.py").read_text(), str(tmp_path / "script.py"), "exec"), {"__name__": "script"}, known)
        names.append(ask.script_name(known["teacher"]))
    assert names[0] == names[2] != names[1] and names[0].startswith("rehearsal script.teacher:1 ")
    assert [ask.script_name(lambda body, before: names[0]), ask.script_name(lambda body, before, said="7": said)] == ["", ""]


def test_the_answers_of_two_servers_are_kept_apart(tmp_path):
    """The address of a model that is really served is part of what its answers are kept under."""
    said = []
    for answer in ("7", "8"):
        with rehearsal(lambda body, before, answer=answer: answer) as server:
            section = ask.ModelSection(server.url, "m", retries=0, cache_dir=str(tmp_path / "answers"))
            with ask.open_models(ask.AskingSettings(teacher=section), _count, tmp_path / answer) as models:
                for _ in range(2):
                    said.append(models.ask(RowDraft("asked", 0, 1), "teacher", "ask", "How many?").text)
                assert ask.spent_of(models)["requests"] == 1
    assert said == ["7", "7", "8", "8"]


def test_a_slow_answer_holds_up_its_own_row_alone(tmp_path):
    order = []

    def script(body, before):
        number = int(body["messages"][0]["content"].split()[1])
        order.append(number)
        return Reply("7", delay=0.6 if number == 0 else 0.0)

    asked(script, tmp_path)
    lines = (tmp_path / "journal").read_text().splitlines()[1:]
    assert [json.loads(line[9:])["index"] for line in lines].index(0) > 5
    assert [json.loads(line)["synth"]["index"] for line in open(tmp_path / "rows.jsonl")] == list(range(20))


def test_prompts_and_models_stand_in_the_row(tmp_path):
    asked(lambda body, before: Reply("7", model="served-7b"), tmp_path)
    prompts = {p["prompt"]: p["messages"] for p in map(json.loads, open(tmp_path / "prompts.jsonl"))}
    for row in map(json.loads, open(tmp_path / "rows.jsonl")):
        assert row["synth"]["models"] == {"teacher": "served-7b"}
        assert [prompts[p][0]["content"] for p in row["synth"]["prompts"]] == [row["messages"][0]["content"]]


def test_the_recipe_is_that_of_what_makes_the_row():
    one = ask.AskingSettings(teacher=ask.ModelSection("http://a/v1", "m"))
    pipeline = produce.Pipeline("asked", "", "", __name__, "Settings", "judge", teacher="teacher")
    recipe = produce.recipe_of(pipeline, one)
    for same in (
        replace(one, rows=7), replace(one, budget=ask.BudgetSection(tokens=5)),
        replace(one, teacher=replace(one.teacher, base_url="http://b/v1", concurrency=99, price_in=1.0)),
    ):  # fmt: skip
        assert produce.recipe_of(pipeline, same) == recipe
    for other in (
        replace(one, seed=2), replace(one, teacher=replace(one.teacher, model="n")),
        replace(one, teacher=replace(one.teacher, temperature=0.1)), replace(one, teacher=replace(one.teacher, options={"top_p": 0.5})),
    ):  # fmt: skip
        assert produce.recipe_of(pipeline, other) != recipe


def test_a_dry_run_shows_a_setting_that_is_a_mapping():
    """What is sent to a teacher decides what comes back."""
    asked = synth_config(pipeline_named("rqa"), "tiny", ["teacher.options={reasoning_effort: low}"])
    assert "reasoning_effort" in asked.picture(whole=False).text and "teacher.options" not in synth_config(pipeline_named("rqa"), "tiny").picture().text
